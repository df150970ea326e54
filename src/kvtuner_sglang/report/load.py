"""The result sections of a load: latencies, rates with their intervals, and other formats under the same load."""

import re
from collections.abc import Sequence
from typing import Any

from kvtuner_sglang.evidence.load_level import summary_level
from kvtuner_sglang.evidence.record import Metric, RunRecord
from kvtuner_sglang.evidence.sweep import markdown_table
from kvtuner_sglang.report.ablation import commit, ended, mixed_commits, quant_name
from kvtuner_sglang.report.language import Text

LOOPS = {"closed": "load_closed", "open": "load_open", "capacity": "load_open", "multiturn": "load_multiturn"}
CACHES = {"cold": "cache_cold", "warm": "cache_warm", "shared_prefix": "cache_shared_prefix", None: "cache_turns"}
LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")
RATES = ("requests_per_s", "output_tokens_per_s", "output_tokens_per_s_per_device", "goodput_per_s", "slo_share",
         "ttft_p50_ms", "tpot_p50_ms", "cached_tokens", "retractions")


def is_load(record: RunRecord) -> bool:
    """Whether the run's workload is a load, not the seed's three tests."""
    return record.config["workload"].get("kind", "seed_tests") != "seed_tests"


def levels(record: RunRecord) -> list[str]:
    """ "concurrency=4" or "rate_per_s=0.5/turn=2", as they were measured: by load, then by turn."""
    found = [key.partition("/")[2] for key in record.metrics if key.startswith("ttft_ms/")]
    return sorted(found, key=lambda where: [float(value) for value in re.findall(r"=([^/]+)", where)])


def load_section(record: RunRecord, text: Text) -> list[str]:
    """Tables of latencies over requests and of rates over repeats."""
    workload, found = record.config["workload"], levels(record)
    rates = [where for where in found if f"requests_per_s/{where}" in record.metrics]
    parts = [f"### 1. {text['load']}", _method(workload, text)]
    if "capacity_per_s" in record.metrics:
        rate = _with_interval(record.metrics["capacity_per_s"], text)
        parts.append(text["capacity_found"].format(rate=rate, repeats=workload["repeats"],
                                                   share=workload["attainment"], **workload["slo"]))
    return [
        *parts,
        markdown_table((text["load_level"], "n", *(f"{name} {p}" for name in LATENCIES for p in ("p50", "p90", "p99"))),
                       [_latency_row(record, where) for where in found]),
        text["rates_method"].format(repeats=workload["repeats"], **workload["slo"]),
        markdown_table((text["load_level"], *RATES), [_rate_row(record, where, text) for where in rates]),
        *_lag(record, rates, text),
    ]


def _method(workload: dict[str, Any], text: Text) -> str:
    loop = text[LOOPS[workload["kind"]]].format(**workload)
    cache = text[CACHES[workload.get("cache")]].format(shared=workload["shared_tokens"])
    return text["sentence_gap"].join((loop, cache, text["load_by"]))


def _latency_row(record: RunRecord, where: str) -> tuple[str, ...]:
    found = [record.metrics[f"{name}/{where}"] for name in LATENCIES]
    return (where, str(found[0].n), *(f"{value:.1f}" for m in found for value in (m.p50, m.p90, m.p99)))


def _rate_row(record: RunRecord, where: str, text: Text) -> tuple[str, ...]:
    return (where, *(_with_interval(record.metrics[f"{name}/{where}"], text) for name in RATES))


def _with_interval(metric: Metric, text: Text) -> str:
    if metric.ci95 is None or metric.min == metric.max:
        return f"{metric.mean:.4g}"
    return text["interval"].format(mean=metric.mean, low=metric.ci95[0], high=metric.ci95[1])


def _lag(record: RunRecord, rates: Sequence[str], text: Text) -> list[str]:
    lags = [record.metrics[f"dispatch_lag_ms/{where}"].p99 for where in rates
            if f"dispatch_lag_ms/{where}" in record.metrics]
    if not lags:
        return []
    return [text["dispatch_lag"].format(worst=max(lags), bound=record.config["workload"]["max_dispatch_lag_ms"])]


def formats_section(record: RunRecord, others: Sequence[RunRecord], text: Text) -> list[str]:
    """Runs of other formats under the same load and in the same memory, at their summary_level; failed ones say why."""
    runs = [record, *others]
    header = (text["setting"], text["status"], text["kv_tokens"], text["effective_bits"], text["capacity_rate"],
              text["load_level"], "ttft_ms p50", "tpot_ms p50", "output_tokens_per_s", "retractions", text["commit"])
    return [f"## {text['formats']}", text["formats_method"],
            markdown_table(header, [_format_row(run, run is record, text) for run in runs]),
            *mixed_commits(runs, text)]


def _format_row(run: RunRecord, this: bool, text: Text) -> tuple[str, ...]:
    name = quant_name(run)
    label = text["this_run"].format(quant=name) if this else name
    where = summary_level(run)
    if run.kv is None or where is None:
        return (label, ended(run, text), *[""] * 8, commit(run, text))
    at = {name: run.metrics[f"{name}/{where}"] for name in ("ttft_ms", "tpot_ms", "output_tokens_per_s", "retractions")}
    capacity = run.metrics.get("capacity_per_s")
    return (label, text.status(run.status), str(run.kv.tokens), f"{run.kv.effective_bits:.2f}",
            _with_interval(capacity, text) if capacity else "", where, f"{at['ttft_ms'].p50:.1f}",
            f"{at['tpot_ms'].p50:.1f}", _with_interval(at["output_tokens_per_s"], text),
            _with_interval(at["retractions"], text), commit(run, text))
