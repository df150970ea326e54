"""Before anything is timed: every kernel against float64 on what its cache holds, on ragged requests."""

import contextlib
import subprocess
from collections.abc import Iterator, Sequence

import torch
from triton.errors import TritonError

from kvtuner_sglang.errors import RunFailed
from kvtuner_sglang.kernel_bench.caches import Batch, Pages, packed_layers, plain_layers, truth
from kvtuner_sglang.kernel_bench.cases import BF16, FP8, KVTUNER, Shape, Storage, storage
from kvtuner_sglang.kernel_bench.contenders import (
    FLASHINFER_WORKSPACE,
    Contender,
    FlashInfer,
    Ours,
    SglangTriton,
    peer_failed,
)
from kvtuner_sglang.kernel_bench.samples import Check
from kvtuner_triton.decode_case import relative_error

LENGTHS = (1, 64, 65, 700, 129, 2048, 333)
FAULTS = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, OSError, ImportError, TritonError,
          subprocess.SubprocessError)  # what libraries raise when a kernel cannot be built or launched


def contenders(pages: Pages, batch: Batch, formats: Sequence[str], peers: bool, rotated_bytes: float,
               multiprocessors: int | None = None) -> Iterator[Contender]:
    """All that are to be compared, planned and run once, so that what cannot run is named; raises RunFailed."""
    def count(store: Storage) -> int:
        return store.layers(batch.shape, batch.lengths, rotated_bytes)

    for name in formats:
        with naming(KVTUNER, name):
            store = storage(name)
            yield _started(Ours(batch, store, packed_layers(pages, batch, store, count(store)), multiprocessors))
    if not peers:
        return
    workspace = torch.zeros(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=batch.q.device)
    for store in (BF16, FP8):
        layers = plain_layers(pages, batch, store, count(store))
        for graph in (True, False):
            with naming("flashinfer", store.name):
                yield _started(FlashInfer(batch, store, layers, workspace, graph))
        if store is BF16:
            with naming("sglang_triton", store.name):
                yield _started(SglangTriton(batch, store, layers))


def _started(contender: Contender) -> Contender:
    contender.out.fill_(float("nan"))
    contender.plan()
    contender.layer(contender.layers - 1)
    if contender.out.is_cuda:
        torch.cuda.synchronize()
    return contender


@contextlib.contextmanager
def naming(kernel: str, name: str) -> Iterator[None]:
    """Turn what a library raises into one sentence that says whose kernel it was."""
    try:
        yield
    except FAULTS as error:
        if kernel != KVTUNER:
            raise peer_failed(f"{kernel} ({name})", error) from error
        raise RunFailed(f"the kernel of {name} cannot run here: {type(error).__name__}: "
                        f"{' '.join(str(error).split())[:300]}.") from error


def check_decode(shape: Shape, formats: Sequence[str], peers: bool, device: str, seed: int,
                 lengths: Sequence[int] = LENGTHS, multiprocessors: int | None = None) -> list[Check]:
    """One check a contender."""
    pages, batch = Pages.random(shape, device, seed), Batch.random(shape, lengths, device, seed)
    found: dict[tuple[str, str], Check] = {}
    for contender in contenders(pages, batch, formats, peers, 1, multiprocessors):
        exact = truth(pages, batch, contender.store, torch.float64)
        bf16_error = relative_error(truth(pages, batch, contender.store, torch.bfloat16), exact)
        check = Check(contender.kernel, contender.store.name, shape.name, relative_error(contender.out, exact),
                      bf16_error)
        key = (check.kernel, check.format)
        if key not in found or not check.error <= found[key].error:  # the worst of its options; NaN is worst
            found[key] = check
    return list(found.values())
