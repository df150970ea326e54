"""Quality records and recipe files -> one tidy CSV:

    python -m kvtuner_sglang.quality.summary runs/published/quality

The folder holds runs (quality-*/record.json) and recipe files (recipes-*.json); summary.csv is written into it.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.machine_paths import forget_machine_paths
from kvtuner_sglang.evidence.published import publishable, write_sums
from kvtuner_sglang.evidence.record import RECORD_FILE, RunRecord, load_record
from kvtuner_sglang.evidence.tidy_tables import to_csv

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "model", "quant", "key_axis", "group", "effective_bits", "kl", "kl_se", "top1_agreement", "ppl", "recall",
    "recall_se", "arithmetic", "n_tokens", "n_recall", "engine", "device", "commit",
    # beyond the tidy minimum: what the first ones are compared with
    "ppl_full", "recall_full", "recall_difference", "recall_difference_low", "recall_difference_high",
    "arithmetic_full", "n_arithmetic", "dtype", "model_sha256", "run",
)
OPTIONAL = ("recall_full", "recall_difference", "recall_difference_low", "recall_difference_high", "arithmetic_full")
CSV_FILE = "summary.csv"
AXES = {0: "token", 1: "channel"}


def row_of_record(record: RunRecord) -> dict[str, Any]:
    """One run through the engine; raises UserError if it did not end well."""
    if record.kv is None or record.model is None:
        raise UserError(f"{record.name} is {record.status}, so it has no figures: leave it out of the folder.")
    quant, kv = record.config["quant"], record.kv
    mean = {name: metric.mean for name, metric in record.metrics.items()}
    return {
        "model": record.config["model"]["name"], "quant": quant["name"],
        "key_axis": AXES[quant["axis_key"]] if quant["enabled"] else "none",
        "group": (kv.page_size if quant["axis_key"] else quant["group_size"] or "head") if quant["enabled"] else "none",
        "effective_bits": kv.effective_bits, "kl": mean["kl_nats"], "kl_se": mean.get("kl_se_nats"),
        "top1_agreement": mean["top1_agreement"], "ppl": mean["perplexity"], "recall": mean.get("recall"),
        "recall_se": mean.get("recall_se"), "arithmetic": mean.get("arithmetic"),
        "n_tokens": record.metrics["kl_nats"].n, "n_recall": _n(record, "recall"), "engine": "sglang",
        "device": ", ".join(record.environment.gpus or ()) or record.environment.cpu,
        "commit": (record.environment.git_sha or "unknown")[:12], "ppl_full": mean["perplexity_full"],
        **{name: mean.get(name) for name in OPTIONAL},
        "n_arithmetic": _n(record, "arithmetic"), "dtype": record.model.dtype, "model_sha256": record.model.sha256,
        "run": record.name,
    }


def _n(record: RunRecord, name: str) -> int:
    return record.metrics[name].n if name in record.metrics else 0


def rows_of_recipes(path: Path) -> list[dict[str, Any]]:
    """The rows of one file of quality.recipe_search."""
    tree = json.loads(path.read_text())
    rows = []
    for row in tree["rows"]:
        key = row["plan"][0]["key"]
        kept = {name: row.get(name) for name in COLUMNS if name in row}
        rows.append({
            **kept, "quant": row["recipe"], "key_axis": AXES[key["axis"]],
            "group": (key["group"] or "head") if len(row["plan"]) == 1 else "per layer", "engine": tree["engine"],
            "device": tree["device"], "dtype": tree["dtype"], "commit": (tree["commit"] or "unknown")[:12],
            "run": path.name,
        })
    return rows


def summarize(folder: Path) -> "pd.DataFrame":
    """All rows of `folder`, ordered by model, engine and bits; raises UserError if there are none."""
    import pandas as pd

    rows = [row_of_record(load_record(path.parent)) for path in sorted(folder.glob("quality-*/record.json"))]
    for path in sorted(folder.glob("recipes-*.json")):
        rows += rows_of_recipes(path)
    if not rows:
        raise UserError(f"{folder} holds no quality run and no recipe file: run task=quality first.")
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return frame.sort_values(["model", "engine", "effective_bits", "quant"], kind="stable", ignore_index=True)


def tables(folder: Path) -> dict[str, str]:
    """{file name: text} of what the records of a published folder give."""
    return {CSV_FILE: to_csv(summarize(folder))}


def write_summary(folder: Path) -> Path:
    path = folder / CSV_FILE
    path.write_text(tables(folder)[CSV_FILE])
    return path


def main(arguments: Sequence[str]) -> None:
    if len(arguments) != 1:
        sys.exit(__doc__)
    folder = Path(arguments[0])
    try:
        for path in folder.glob(f"quality-*/{RECORD_FILE}"):
            publishable(path.parent, "quality")
            forget_machine_paths(path.parent)
        paths = [write_summary(folder), write_sums(folder)]
    except UserError as error:
        sys.exit(f"kvtuner: {error}")
    sys.stdout.write("".join(f"{path}\n" for path in paths))


if __name__ == "__main__":
    main(sys.argv[1:])
