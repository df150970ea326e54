"""Records of load workloads -> one tidy table, a row a level and, of conversations, a row a turn."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.published import require_comparable
from kvtuner_sglang.evidence.record import Metric, RunRecord
from kvtuner_sglang.report.load import is_load, levels

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("machine", "model", "dist", "quant", "workload", "kv_gib", "kv_tokens", "effective_bits", "concurrency",
           "rate_per_s", "turn", "repeats", "requests", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "itl_p99_ms",
           "e2e_p50_ms", "output_tok_s", "output_tok_s_low", "output_tok_s_high", "goodput_per_s", "slo_share",
           "cached_tokens", "retractions", "capacity_per_s", "capacity_low", "capacity_high", "load_average", "commit",
           "run")
CELL = ["machine", "model", "workload", "dist", "quant", "concurrency", "rate_per_s", "turn"]
LATENCIES = {"ttft_p50_ms": ("ttft_ms", "p50"), "ttft_p99_ms": ("ttft_ms", "p99"), "tpot_p50_ms": ("tpot_ms", "p50"),
             "itl_p99_ms": ("itl_ms", "p99"), "e2e_p50_ms": ("e2e_ms", "p50")}
RATES = ("goodput_per_s", "slo_share", "cached_tokens", "retractions")


def rows_of(record: RunRecord) -> list[dict[str, Any]]:
    """A row a level; raises UserError for a run without figures or of another workload.

    Latencies are over all requests of all repeats; the others are means over repeats, tokens a second and the capacity
    with Student's 95 % interval (low, high) where there are several.  requests: of all repeats.  load_average: of the
    minute before the run.
    """
    if record.kv is None:
        raise UserError(f"{record.name} is {record.status} ({record.reason}), so it has no figures: leave it out.")
    if not is_load(record):
        raise UserError(f"{record.name} is no load but workload={record.config['workload']['name']}: publish it with "
                        "kvtuner_sglang.ablation.publish.")
    load = record.environment.load_average
    shared = {
        "machine": record.environment.hardware, "model": record.config["model"]["name"],
        "dist": record.config["dist"]["name"], "quant": record.config["quant"]["name"],
        "workload": record.config["workload"]["name"], "kv_gib": record.config["server"]["kv_gib"],
        "kv_tokens": record.kv.tokens, "effective_bits": record.kv.effective_bits,
        **_interval(record.metrics.get("capacity_per_s"), "capacity_per_s", "capacity"),
        "load_average": load[0] if load else None, "commit": (record.environment.git_sha or "unknown")[:12],
        "run": record.name,
    }
    return [{**shared, **_level(record, where)} for where in levels(record)]


def _level(record: RunRecord, where: str) -> dict[str, Any]:
    """What was measured at "concurrency=4" or "rate_per_s=0.5/turn=2"."""
    row: dict[str, Any] = {label: float(value) for label, value in re.findall(r"(\w+)=([^/]+)", where)}
    row |= {column: getattr(record.metrics[f"{name}/{where}"], part) for column, (name, part) in LATENCIES.items()}
    row["requests"] = record.metrics[f"ttft_ms/{where}"].n
    row |= {name: record.metrics[f"{name}/{where}"].mean for name in RATES if f"{name}/{where}" in record.metrics}
    rate = record.metrics.get(f"output_tokens_per_s/{where}")
    return row | _interval(rate, "output_tok_s", "output_tok_s") | ({"repeats": rate.n} if rate else {})


def _interval(metric: Metric | None, mean: str, ends: str) -> dict[str, float | None]:
    if metric is None:
        return {}
    low, high = metric.ci95 or (None, None)  # of a rate that one repeat alone tried
    return {mean: metric.mean, f"{ends}_low": low, f"{ends}_high": high}


def table_of(records: Iterable[RunRecord]) -> "pd.DataFrame":
    """All rows, ordered by cell; raises UserError for a format twice or runs of a workload that differ in more."""
    import pandas as pd

    records = list(records)
    require_comparable(records, apart=("workload",))
    frame = pd.DataFrame([row for record in records for row in rows_of(record)], columns=list(COLUMNS))
    return frame.sort_values(CELL, kind="stable", ignore_index=True)
