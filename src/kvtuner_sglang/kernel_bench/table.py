"""What the console shows, one line a cell, and how the samples stand to what is asked of the kernels."""

from collections.abc import Iterator, Sequence

from kvtuner_sglang.evidence.record import Verdict
from kvtuner_sglang.kernel_bench.cases import FLASHINFER, KVTUNER, SGLANG_TRITON, SHAPES
from kvtuner_sglang.kernel_bench.samples import (
    OUR_BOUND,
    Check,
    DecodeTimes,
    Sample,
    StoreCheck,
    StoreTimes,
    best,
    ceilings_of,
)

SHORT = {FLASHINFER: "FI ", SGLANG_TRITON: "SGL ", KVTUNER: ""}
MAIN = "kv4"  # the default format, which most of the acceptance is about
SLOWER = 1.05
# kernel format, over peer's format, at 28/4/128 batch, context: at least so many times as fast
ASKED = (("kv4", "bf16", 16, 32768, 3.0), ("kv4", "fp8", 16, 32768, 1.8), ("kv8", "fp8", 16, 32768, 1.0),
         ("kv2", "bf16", 16, 32768, 4.0), ("kv4", "bf16", 1, 32768, 1.0))
ASKED_READ, ASKED_COPY, ASKED_STEP_US = 0.75, 0.70, 5.0


def floor_us(times: DecodeTimes, read_gb_s: float) -> float:
    """What a plain read of the bytes that it must move takes: a yardstick, not a bound."""
    return times.bytes / read_gb_s / 1e3


def find(times: Sequence[DecodeTimes], kernel: str, name: str) -> DecodeTimes | None:
    return next((t for t in times if (t.kernel, t.format) == (kernel, name)), None)


def cell_line(times: Sequence[DecodeTimes], read_gb_s: float) -> str:
    """Microseconds a layer of every kernel of one cell, then kv4 over FlashInfer and its rate over a plain read's."""
    rows = best(times)
    first = rows[0]
    line = f"  {SHAPES[first.shape]!s:9} {first.batch:3} x {first.context:<6} us " + "  ".join(
        f"{SHORT[t.kernel]}{t.format} {t.median_us:.1f}" for t in rows)
    main = find(rows, KVTUNER, MAIN)
    if main is None:
        return line
    peers = [(name, find(rows, FLASHINFER, name)) for name in ("bf16", "fp8")]
    ratios = [f"{peer.median_us / main.median_us:.2f}x {name}" for name, peer in peers if peer]
    return f"{line} | {MAIN}: {' '.join(ratios)} {main.gb_s / read_gb_s:.2f} of a plain read"


def check_line(check: Check) -> str:
    return (f"  {'ok  ' if check.ok else 'FAIL'} {SHORT[check.kernel]}{check.format} {SHAPES[check.shape]}: error "
            f"{check.error:.2e}, {check.ratio:.2f} of bf16 PyTorch's")


def store_line(times: StoreTimes, copy_gb_s: float) -> str:
    return (f"  store {times.format:13} {times.work:13} {times.tokens:5} tokens: {times.median_us:7.2f} us a layer, "
            f"{times.gb_s:5.0f} GB/s, {100 * times.gb_s / copy_gb_s:3.0f} % of copy")


def acceptance(samples: Sequence[Sample]) -> Iterator[Verdict]:
    """A verdict on everything that is asked of the kernels and was measured."""
    times = best(samples)
    ceilings = ceilings_of(samples)
    yield from _checked(samples)
    for ours, peer, batch, context, asked in ASKED:
        cell = [t for t in times if (t.shape, t.batch, t.context) == ("qwen2_5_7b", batch, context)]
        mine, other = find(cell, KVTUNER, ours), find(cell, FLASHINFER, peer)
        if mine and other:
            ratio = other.median_us / mine.median_us
            yield _verdict(ratio >= asked, f"{ours} {ratio:.2f}x FlashInfer {peer} at 28/4/128 {batch} x {context}, "
                                           f"asked {asked:.1f}x")
        if mine and (ours, peer, batch) == (MAIN, "bf16", 16):
            share = floor_us(mine, ceilings.read_gb_s) / mine.median_us
            yield _verdict(share >= ASKED_READ, f"{ours} at {share:.2f} of a plain read there, asked {ASKED_READ:.2f}")
    yield from _slower(times)
    yield from _stores([s for s in samples if isinstance(s, StoreTimes) and s.format == MAIN], ceilings.copy_gb_s)


def _checked(samples: Sequence[Sample]) -> Iterator[Verdict]:
    ours = [s for s in samples if isinstance(s, Check) and s.kernel == KVTUNER]
    if ours:
        worst = max(ours, key=lambda s: s.ratio)
        yield _verdict(all(s.ok for s in ours), f"error at most {worst.ratio:.2f} of bf16 PyTorch's ({worst.format} "
                                                f"{worst.shape}), asked {OUR_BOUND:.0f}")
    stores = [s for s in samples if isinstance(s, StoreCheck)]
    if stores:
        same = [s for s in stores if not s.wrong]
        yield _verdict(len(same) == len(stores), f"{len(same)} of {len(stores)} stores bit-exact")


def _slower(times: Sequence[DecodeTimes]) -> Iterator[Verdict]:
    """Cells from 4k where kv4 is more than 5 % slower than the faster bf16 peer."""
    slow, cells = [], 0
    for mine in times:
        if (mine.kernel, mine.format) == (KVTUNER, MAIN) and mine.context >= 4096:
            where = (mine.shape, mine.batch, mine.context)
            peers = [t.median_us for t in times if (t.shape, t.batch, t.context) == where
                     and (t.kernel, t.format) in ((FLASHINFER, "bf16"), (SGLANG_TRITON, "bf16"))]
            cells += bool(peers)
            if peers and mine.median_us > SLOWER * min(peers):
                slow.append(f"{SHAPES[mine.shape]} {mine.batch} x {mine.context}")
    if cells:
        yield _verdict(not slow, f"{MAIN} more than 5 % slower than the best bf16 peer in {len(slow)} of {cells} cells "
                                 f"from 4k{': ' + ', '.join(slow) if slow else ''}")


def _stores(stores: Sequence[StoreTimes], copy_gb_s: float) -> Iterator[Verdict]:
    for s in stores:
        if s.work == "extend":
            share = s.gb_s / copy_gb_s
            yield _verdict(share >= ASKED_COPY, f"storing {s.tokens} tokens at {share:.2f} of the copy bandwidth, "
                                                f"asked {ASKED_COPY:.2f}")
        else:
            yield _verdict(s.median_us <= ASKED_STEP_US, f"store in a decode step ({s.work}) {s.median_us:.2f} us a "
                                                         f"layer at batch {s.tokens}, asked {ASKED_STEP_US:.0f}")


def _verdict(held: bool, what: str) -> Verdict:
    return Verdict(held=held, what=what)


def verdict_line(verdict: Verdict) -> str:
    return f"  {'held  ' if verdict.held else 'missed'} {verdict.what}"
