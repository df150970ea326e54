"""Records of an ablation -> one tidy table, a row a test; what a row did not measure is empty."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.published import require_comparable
from kvtuner_sglang.evidence.record import RunRecord

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("machine", "model", "dist", "quant", "kv_tokens", "effective_bits", "kv_bytes_per_token", "prompt_tokens",
           "concurrency", "ttft_p50_ms", "output_tok_s", "tpot_floor_ms", "load_average", "commit", "run")
CELL = ["machine", "model", "dist", "quant", "prompt_tokens", "concurrency"]


def rows_of(record: RunRecord) -> list[dict[str, Any]]:
    """A row a prompt length (alone, cold cache) and a row a concurrency.

    kv_bytes_per_token: as allocated, over all ranks.  tpot_floor_ms: RunRecord.floor_ms, by which two machines of
    a kind are told apart.  load_average: of the minute before the run, other work included.
    """
    if record.kv is None:
        raise UserError(f"{record.name} is {record.status} ({record.reason}), so it has no figures: leave it out.")
    load = record.environment.load_average
    shared = {
        "machine": record.environment.hardware, "model": record.config["model"]["name"],
        "dist": record.config["dist"]["name"], "quant": record.config["quant"]["name"], "kv_tokens": record.kv.tokens,
        "effective_bits": record.kv.effective_bits,
        "kv_bytes_per_token": sum(rank.bytes_per_token_allocated for rank in record.kv.ranks),
        "tpot_floor_ms": record.floor_ms, "load_average": load[0] if load else None,
        "commit": (record.environment.git_sha or "unknown")[:12], "run": record.name,
    }
    ttft = [{**shared, "prompt_tokens": n, "concurrency": 1,
             "ttft_p50_ms": record.metric("ttft_ms", prompt_tokens=n).p50}
            for n in record.levels("ttft_ms", "prompt_tokens")]
    tokens = record.config["workload"]["throughput"]["prompt_tokens"]
    throughput = [{**shared, "prompt_tokens": tokens, "concurrency": n,
                   "output_tok_s": record.metric("output_tokens_per_s", concurrency=n).mean}
                  for n in record.levels("output_tokens_per_s", "concurrency")]
    return ttft + throughput


def table_of(records: Iterable[RunRecord]) -> "pd.DataFrame":
    """All rows, ordered by cell; raises UserError for a format twice or runs that differ in more than was varied."""
    import pandas as pd

    records = list(records)
    require_comparable(records)
    frame = pd.DataFrame([row for record in records for row in rows_of(record)], columns=list(COLUMNS))
    return frame.sort_values(CELL, kind="stable", ignore_index=True)
