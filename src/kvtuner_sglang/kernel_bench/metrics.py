"""From samples to what the record keeps: metrics with their n, the rules that held, and verdicts."""

from collections.abc import Sequence

from kvtuner_sglang.evidence.assemble import Figures
from kvtuner_sglang.evidence.record import Metric, metric_key
from kvtuner_sglang.kernel_bench.cases import KVTUNER
from kvtuner_sglang.kernel_bench.samples import (
    Check,
    DecodeTimes,
    LeftOut,
    Sample,
    StoreCheck,
    StoreTimes,
    best,
    ceilings_of,
)
from kvtuner_sglang.kernel_bench.table import acceptance
from kvtuner_sglang.measure.metrics import summarize

ACCURATE = ("every decode kernel's error on ragged requests is at most twice that of plain PyTorch in bf16 against "
            "float64")
SAME_BYTES = "every byte that a store wrote is the reference's"
SAME_CACHES = "every peer read the same keys and values behind the same page table"
IN_TURN = "every kernel of a cell was replayed in turn with the others, in one process on one device"
FINITE = "the last layer's output of every cell is finite"
CEILING = "no kernel moved its bytes faster than the bandwidths of this record, the largest that were seen"


def figures(samples: Sequence[Sample]) -> Figures:
    """There is no engine, so no KV cache of one."""
    left_out = tuple(f"left out: {s.reason}" for s in samples if isinstance(s, LeftOut))
    return Figures(metrics(samples), rules_held(samples), left_out, verdicts=tuple(acceptance(samples)))


def rules_held(samples: Sequence[Sample]) -> tuple[str, ...]:
    """Of a run that ended well, the rules that there was something to hold to."""
    ours, peers = ([s for s in samples if isinstance(s, Check) and (s.kernel == KVTUNER) is mine]
                   for mine in (True, False))
    stores, times = ([s for s in samples if isinstance(s, kind)] for kind in (StoreCheck, DecodeTimes))
    found = ((ours, ACCURATE), (stores, SAME_BYTES), (peers, SAME_CACHES), (times, IN_TURN), (times, FINITE),
             (times, CEILING))
    return tuple(rule for held_by, rule in found if held_by)


def metrics(samples: Sequence[Sample]) -> dict[str, Metric]:
    """Names are quantity_unit/shape/kernel/format/where: of every cell the fastest of a peer's options."""
    ceilings = ceilings_of(samples)
    found = {"copy_gb_s": summarize([ceilings.copy_gb_s], "GB/s"), "read_gb_s": summarize([ceilings.read_gb_s], "GB/s")}
    for check in samples:
        if isinstance(check, Check):
            found[f"error_ratio/{check.shape}/{check.kernel}/{check.format}"] = summarize([check.ratio], "1")
    for t in best(samples):
        name = f"{t.shape}/{t.kernel}/{t.format}"
        found[metric_key(f"decode_us/{name}", batch=t.batch, context=t.context)] = summarize(t.us, "us")
        if t.kernel == KVTUNER:
            found[metric_key(f"plan_us/{name}", batch=t.batch, context=t.context)] = summarize(t.plan_us, "us")
    for stored in samples:
        if isinstance(stored, StoreTimes):
            name = f"store_us/{stored.shape}/{stored.format}/{stored.work}"
            found[metric_key(name, tokens=stored.tokens)] = summarize(stored.us, "us")
    return found
