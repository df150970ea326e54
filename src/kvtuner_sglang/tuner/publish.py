"""Finished runs of task=tune -> a published folder: records, samples, plans, reports, figures and one table of all:

    python -m kvtuner_sglang.tuner.publish RUN_DIR... runs/published/tuner

A run replaces the published one of the same name; the table is made anew from all runs in the folder.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.published import copy_run, publish_main, publishable, write_sums
from kvtuner_sglang.evidence.record import RunRecord
from kvtuner_sglang.evidence.samples import read_samples
from kvtuner_sglang.quality.compare import share
from kvtuner_sglang.tuner.figures import of_kind, write_figures
from kvtuner_sglang.tuner.plan import PLAN_FILE
from kvtuner_sglang.tuner.report import write_report

if TYPE_CHECKING:
    import pandas as pd

CSV_FILE = "summary.csv"
COLUMNS = ("model", "budget_bits", "plan", "name", "page_size", "effective_bits", "kl_heldout", "kl_se", "recall",
           "recall_se", "commit", "n_tokens", "n_recall", "device", "run")


def rows_of(record: RunRecord, samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for every plan that stands for its kind, and one of full precision's recall."""
    shared = {"model": record.config["model"]["name"], "budget_bits": record.config["tune"]["bits"],
              "commit": (record.environment.git_sha or "unknown")[:12], "run": record.name,
              "device": ", ".join(record.environment.gpus or ()) or record.environment.cpu}
    rows = [{**shared, "plan": row["compared"], "name": row["name"], "page_size": row["page_size"],
             "effective_bits": row["effective_bits"], "kl_heldout": row["kl"], "kl_se": row["kl_se"],
             "n_tokens": row["n_tokens"], **_recall(row["right"])}
            for row in of_kind(samples, "compared") if row["compared"]]
    full = of_kind(samples, "full_precision")[0]["right"]
    return [*rows, {**shared, "plan": "full_precision", "name": "full precision", "effective_bits": 16.0,
                    "kl_heldout": 0.0, "kl_se": 0.0, "n_tokens": rows[0]["n_tokens"], **_recall(full)}]


def _recall(right: Sequence[bool]) -> dict[str, Any]:
    mean = share(right)
    return {"recall": mean.value, "recall_se": mean.standard_error, "n_recall": mean.n}


def table_of(folder: Path) -> "pd.DataFrame":
    """All rows of the runs in `folder`, by model and budget; raises UserError if one cannot be published."""
    import pandas as pd

    rows = []
    for path in sorted(folder.glob("tune-*/record.json")):
        rows += rows_of(publishable(path.parent, "tune"), read_samples(path.parent))
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return frame.sort_values(["model", "budget_bits", "run"], kind="stable", ignore_index=True)


def to_csv(frame: "pd.DataFrame") -> str:
    return str(frame.to_csv(index=False, float_format="%.6g"))


def publish(run_dirs: Sequence[Path], folder: Path) -> list[Path]:
    """Copy, tabulate and draw; returns what was written. Raises UserError, before it writes, if a run cannot be."""
    for run_dir in run_dirs:
        publishable(run_dir, "tune")
        if not (run_dir / PLAN_FILE).is_file():
            raise UserError(f"{run_dir} has no {PLAN_FILE}: repeat the run with force=true.")
    paths = []
    for run_dir in run_dirs:
        kept = folder / run_dir.name
        if kept.resolve() != run_dir.resolve():
            copy_run(run_dir, kept)
            shutil.copyfile(run_dir / PLAN_FILE, kept / PLAN_FILE)
        paths += [kept / PLAN_FILE, write_report(kept), *write_figures(kept)]
    for name, text in tables(folder).items():
        (folder / name).write_text(text)
        paths.append(folder / name)
    return [*paths, write_sums(folder)]


def tables(folder: Path) -> dict[str, str]:
    """{file name: text} of what the records of a published folder give."""
    return {CSV_FILE: to_csv(table_of(folder))}


def main(arguments: Sequence[str]) -> None:
    publish_main(__doc__, arguments, publish)


if __name__ == "__main__":
    main(sys.argv[1:])
