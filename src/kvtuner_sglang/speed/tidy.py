"""Records of task=speed -> one tidy table, a row a cell; what a row did not measure is empty."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.record import KVRecord, RunRecord
from kvtuner_sglang.speed.plan import PLUGIN_BACKEND

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("gpu", "model", "dist", "quant", "backend", "workload", "batch", "context", "kv_tokens", "decode_tok_s",
           "ttft_ms", "tpot_ms", "commit", "run")
CELL = ["model", "dist", "quant", "backend", "workload", "batch", "context"]
DECODE = {"decode_tok_s": ("decode", "tpot_ms"), "saturation_decode_tok_s": ("saturation", "saturation_tpot_ms")}
TTFT = {"ttft_ms": "ttft", "ttft_cached_ms": "ttft_cached"}


def kv_of(record: RunRecord) -> KVRecord:
    """What the engine said of its cache; raises UserError if the run did not end well."""
    if record.kv is None:
        raise UserError(f"{record.name} is {record.status} ({record.reason}), so it has no figures: leave it out.")
    return record.kv


def gpu_of(record: RunRecord) -> str:
    """The GPU that was measured; raises UserError if it was none."""
    if kv_of(record).ranks[0].device == "cpu" or not record.environment.gpus:
        raise UserError(f"{record.name} ran on no GPU that nvidia-smi names: what it measured is not published.")
    return record.environment.gpus[0]


def backend_of(record: RunRecord) -> str:
    """The attention that served the run, by the engine's own word: kvtuner, flashinfer or triton."""
    kv = kv_of(record)
    return PLUGIN_BACKEND if kv.enabled else kv.ranks[0].attention


def rows_of(record: RunRecord) -> list[dict[str, Any]]:
    """Medians of every cell of one run. context is the whole prompt, `ttft_cached` the part of it that was cached."""
    shared = {
        "gpu": gpu_of(record), "model": record.config["model"]["name"], "dist": record.config["dist"]["name"],
        "quant": record.config["quant"]["name"], "backend": backend_of(record),
        "kv_tokens": int(record.metrics["kv_tokens"].p50), "commit": (record.environment.git_sha or "unknown")[:12],
        "run": record.name,
    }
    rows = []
    for key, metric in record.metrics.items():
        name, _, where = key.partition("/")
        at = {label: int(value) for label, value in re.findall(r"(\w+)=(\d+)", where)}
        if name in DECODE:
            workload, tpot = DECODE[name]
            rows.append({**shared, "workload": workload, "batch": at["batch"], "context": at["context"],
                         "decode_tok_s": metric.p50, "tpot_ms": record.metrics[f"{tpot}/{where}"].p50})
        elif name in TTFT:
            tokens = at.get("prompt_tokens") or at["cached"] + at["new"]
            workload = f"{TTFT[name]}_{at['cached']}" if "cached" in at else TTFT[name]
            rows.append({**shared, "workload": workload, "batch": 1, "context": tokens, "ttft_ms": metric.p50})
    return rows


def table_of(records: Iterable[RunRecord]) -> "pd.DataFrame":
    """All rows, ordered by cell; raises UserError if two runs measured the same one."""
    import pandas as pd

    frame = pd.DataFrame([row for record in records for row in rows_of(record)], columns=list(COLUMNS))
    twice = frame[frame.duplicated(["gpu", *CELL])]
    if not twice.empty:
        row = twice.iloc[0]
        raise UserError(f"two runs measured {row['quant']} ({row['backend']}) at {row['workload']} {row['batch']} x "
                        f"{row['context']}: publish one of them.")
    return frame.sort_values(CELL, kind="stable", ignore_index=True)
