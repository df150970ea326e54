"""Records of task=agreement -> one tidy table, a row a layout; log-probabilities in nats."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kvtuner_sglang.agreement.figures import rows
from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.record import RunRecord

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("device", "model", "dtype", "quant", "dist", "floor_mean", "floor_max", "mean", "max", "tokens",
           "texts_equal", "prompts", "within", "commit", "run")
CELL = ["device", "model", "dtype", "quant", "dist"]


def device_of(record: RunRecord) -> str:
    """The GPU that served, or the processor; raises UserError if the run has no figures."""
    if record.kv is None:
        raise UserError(f"{record.name} is {record.status} ({record.reason}), so it has no figures: leave it out.")
    if record.kv.ranks[0].device.startswith("cpu"):
        return record.environment.cpu
    if not record.environment.gpus:
        raise UserError(f"{record.name} ran on a GPU that nvidia-smi does not name: run it where it does.")
    return record.environment.gpus[0]


def rows_of(record: RunRecord) -> list[dict[str, Any]]:
    """One row for every layout of a run."""
    shared = {"device": device_of(record), "model": record.config["model"]["name"],
              "dtype": record.model.dtype if record.model else None, "quant": record.config["quant"]["name"],
              "commit": (record.environment.git_sha or "unknown")[:12], "run": record.name}
    return [{**shared, **each} for each in rows(record.metrics)]


def table_of(records: Iterable[RunRecord]) -> "pd.DataFrame":
    """All rows, ordered; raises UserError if two runs measured the same layout."""
    import pandas as pd

    frame = pd.DataFrame([row for record in records for row in rows_of(record)], columns=list(COLUMNS))
    twice = frame[frame.duplicated(CELL)]
    if not twice.empty:
        row = twice.iloc[0]
        raise UserError(f"two runs measured {row['model']} {row['dtype']} {row['quant']} on {row['dist']}: publish one "
                        "of them.")
    return frame.sort_values(CELL, kind="stable", ignore_index=True)
