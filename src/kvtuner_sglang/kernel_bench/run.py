"""Correctness, then times, in one process on one device."""

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from kvtuner_sglang.errors import ConfigError, MeasurementInvalid
from kvtuner_sglang.kernel_bench import compile as compile_kernels
from kvtuner_sglang.kernel_bench.cases import SHAPES, cells, too_large
from kvtuner_sglang.kernel_bench.check import check_decode
from kvtuner_sglang.kernel_bench.config import KernelsConfig
from kvtuner_sglang.kernel_bench.contenders import require_peers
from kvtuner_sglang.kernel_bench.decode_times import time_cell
from kvtuner_sglang.kernel_bench.samples import Ceilings, Check, DecodeTimes, LeftOut, Sample, StoreCheck, StoreTimes
from kvtuner_sglang.kernel_bench.store_times import check_stores, time_stores
from kvtuner_sglang.kernel_bench.table import cell_line, check_line, store_line
from kvtuner_sglang.measure.hardware import peak_of
from kvtuner_triton.timing import ceilings, graph_samples

Say = Callable[[str], None]
DEVICE = "cuda"
L2_MULTIPLE = 3  # what a graph's caches are together, in sizes of the L2 cache


def require_device(config: KernelsConfig) -> None:
    """Raises UserError, one sentence, where nothing could be measured."""
    if not torch.cuda.is_available():
        raise ConfigError("task=kernels times GPU kernels and torch sees no CUDA device here: run it where an NVIDIA "
                          "GPU is.")
    if config.peers:
        require_peers()


def rotated_bytes() -> float:
    return L2_MULTIPLE * torch.cuda.get_device_properties(DEVICE).L2_cache_size


def bench(config: KernelsConfig, seed: int, say: Say) -> Iterator[Sample]:
    """Every sample, as it is taken. Raises RunFailed if a kernel cannot run, MeasurementInvalid if one is wrong."""
    start = time.perf_counter()
    count = sum(1 for _ in map(_said(say), compile_kernels.build_all(config)))
    say(f"  {count} groups of kernels built after {time.perf_counter() - start:.0f} s")
    yield from _checks(config, seed, say)
    say(f"  checked after {time.perf_counter() - start:.0f} s")
    copy, read = ceilings()
    timed: list[DecodeTimes | StoreTimes] = []
    say(f"  device copy {copy:.0f} GB/s (read + write), plain read {read:.0f} GB/s")
    if config.store:
        shape = SHAPES[config.shapes[0]]
        for stored in time_stores(shape, config.formats, config.repeats, rotated_bytes(), graph_samples, DEVICE, seed):
            say(store_line(stored, copy))
            timed.append(stored)
            yield stored
    for cell in cells(config):
        reason = too_large(cell, config.memory_gib, rotated_bytes())
        if reason:
            say(f"  left out: {reason}")
            yield LeftOut(str(cell), reason)
            continue
        times = time_cell(cell, config.repeats, rotated_bytes(), graph_samples, DEVICE, seed)
        torch.cuda.empty_cache()
        say(cell_line(times, read))
        timed += times
        yield from times
    yield ceilings_over(copy, read, timed, torch.cuda.get_device_name() if DEVICE == "cuda" else None)
    say(f"  timed after {time.perf_counter() - start:.0f} s")


def ceilings_over(copy_gb_s: float, read_gb_s: float, timed: Sequence[DecodeTimes | StoreTimes],
                  gpu: str | None) -> Ceilings:
    """What was measured, or what a timed kernel did faster: then nothing is faster than the floor that it sets.

    Raises MeasurementInvalid if a kernel moved its bytes faster than the GPU's data sheet lets its memory.
    """
    peak = peak_of(gpu)
    for t in timed:
        if peak is not None and t.gb_s * 1e9 > peak.bytes_per_s:
            raise MeasurementInvalid(f"{t.kind} {t.format} at {SHAPES[t.shape]} moved {t.gb_s:.0f} GB/s, more than the "
                                     f"{peak.bytes_per_s / 1e9:.0f} of this GPU's memory: a cache served it.")
    stores, decodes = ([t.gb_s for t in timed if isinstance(t, kind)] for kind in (StoreTimes, DecodeTimes))
    return Ceilings(max([copy_gb_s, *stores]), max([read_gb_s, *decodes]))


def _said(say: Say) -> Callable[[compile_kernels.Job], compile_kernels.Job]:
    def tell(job: compile_kernels.Job) -> compile_kernels.Job:
        say(f"  built {job}")
        return job

    return tell


def _checks(config: KernelsConfig, seed: int, say: Say) -> Iterator[Check | StoreCheck]:
    """All checks, then MeasurementInvalid if one did not hold."""
    wrong = []
    formats = tuple(dict.fromkeys((*config.formats, *config.long_formats)))
    for name in config.shapes:
        for check in check_decode(SHAPES[name], formats, config.peers, DEVICE, seed):
            say(check_line(check))
            wrong += [] if check.ok else [f"{check.kernel} {check.format} at {SHAPES[name]} has {check.ratio:.2f} "
                                          "times the error of bf16 PyTorch"]
            yield check
    if config.store:
        for stored in check_stores(SHAPES[config.shapes[0]], config.formats, DEVICE, seed):
            wrong += [f"storing {stored.format} ({stored.work}) gives other {', '.join(stored.wrong)} than the "
                      "reference"] if stored.wrong else []
            yield stored
    if wrong:
        raise MeasurementInvalid(f"{'; '.join(wrong)}: times of wrong kernels do not count.")
