"""What is written down, one dataclass instance a line of the samples file; every time that was taken is in them."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kvtuner_sglang.kernel_bench.cases import KVTUNER

OUR_BOUND = 2.0  # error over that of plain PyTorch in bf16
PEER_BOUND = 5.0  # peers are not on trial: this shows that they read the same caches


@dataclass(frozen=True)
class Ceilings:
    """GB/s of a device copy (read and write counted) and of plain reading, or of what was faster (run.ceilings_over).

    Older runs have what one way of plain reading reached, and FlashInfer went beyond it.
    """

    copy_gb_s: float
    read_gb_s: float
    kind: str = "ceilings"


@dataclass(frozen=True)
class Check:
    """Relative errors against float64 over what the cache holds: the kernel's, and plain PyTorch's in bf16."""

    kernel: str
    format: str
    shape: str
    error: float
    bf16_error: float
    kind: str = "check"

    @property
    def ratio(self) -> float:
        return self.error / self.bf16_error

    @property
    def ok(self) -> bool:
        return self.ratio <= (OUR_BOUND if self.kernel == KVTUNER else PEER_BOUND)  # not with NaN


@dataclass(frozen=True)
class StoreCheck:
    """Whether every byte that a store wrote is the reference's; `wrong` names the tensors where not."""

    format: str
    shape: str
    work: str
    wrong: tuple[str, ...]
    kind: str = "store_check"


@dataclass(frozen=True)
class DecodeTimes:
    """Microseconds a layer, one a replay, of one kernel in one cell; plan_us: a whole step's, ours alone."""

    kernel: str
    format: str
    options: str
    key_axis: str
    shape: str
    q_heads: int
    kv_heads: int
    head_dim: int
    page: int
    batch: int
    context: int
    layers: int
    steps: int
    bytes: int
    us: tuple[float, ...]
    plan_us: tuple[float, ...] = ()
    kind: str = "decode"

    @property
    def median_us(self) -> float:
        return statistics.median(self.us)

    @property
    def gb_s(self) -> float:
        return self.bytes / self.median_us / 1e3


@dataclass(frozen=True)
class StoreTimes:
    """Microseconds a layer, one a replay.  work: extend, step or step_complete (every request completes a page)."""

    format: str
    shape: str
    work: str
    tokens: int
    layers: int
    bytes: int
    us: tuple[float, ...]
    kind: str = "store"

    @property
    def median_us(self) -> float:
        return statistics.median(self.us)

    @property
    def gb_s(self) -> float:
        return self.bytes / self.median_us / 1e3


@dataclass(frozen=True)
class LeftOut:
    """A cell that was asked for and not measured."""

    cell: str
    reason: str
    kind: str = "left_out"


Sample = Ceilings | Check | StoreCheck | DecodeTimes | StoreTimes | LeftOut
_KINDS: dict[str, type[Sample]] = {"ceilings": Ceilings, "check": Check, "store_check": StoreCheck,
                                   "decode": DecodeTimes, "store": StoreTimes, "left_out": LeftOut}


def sample_of(line: Mapping[str, Any]) -> Sample:
    """A line of the samples file as it was written."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in line.items()}
    return _KINDS[line["kind"]](**fields)


def best(samples: Iterable[Sample]) -> list[DecodeTimes]:
    """Decode times with one row a kernel, format and cell: the fastest of its options."""
    found: dict[tuple, DecodeTimes] = {}
    for s in samples:
        if isinstance(s, DecodeTimes):
            key = (s.kernel, s.format, s.shape, s.batch, s.context)
            if key not in found or s.median_us < found[key].median_us:
                found[key] = s
    return list(found.values())


def ceilings_of(samples: Iterable[Sample]) -> Ceilings:
    return next(s for s in samples if isinstance(s, Ceilings))
