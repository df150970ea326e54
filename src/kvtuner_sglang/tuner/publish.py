"""Finished runs of task=tune -> a published folder: records, samples, plans, reports, figures and one table of all:

    python -m kvtuner_sglang.tuner.publish RUN_DIR... runs/published/tuner

A run replaces the published one of the same name; the table is made anew from all runs in the folder.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.published import publish_main, publish_runs, published_runs, write_sums
from kvtuner_sglang.evidence.record import RunRecord
from kvtuner_sglang.evidence.samples import read_samples
from kvtuner_sglang.evidence.tidy_tables import to_csv
from kvtuner_sglang.quality.compare import share
from kvtuner_sglang.quant import load_plan
from kvtuner_sglang.tuner.figures import of_kind, write_figures
from kvtuner_sglang.tuner.menu import pair_name
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


def table_of(runs: Sequence[tuple[RunRecord, Path]]) -> "pd.DataFrame":
    """All rows of records and their folders, by model and budget; raises UserError if a plan is not its samples'."""
    import pandas as pd

    rows = []
    for record, run_dir in runs:
        samples = read_samples(run_dir)
        _require_own_plan(run_dir, of_kind(samples, "compared")[0])
        rows += rows_of(record, samples)
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return frame.sort_values(["model", "budget_bits", "run"], kind="stable", ignore_index=True)


def _require_own_plan(run_dir: Path, tuned: dict[str, Any]) -> None:
    """Raise UserError unless plan.yaml is what the samples' row of the tuned plan was measured with."""
    plan = load_plan(run_dir / PLAN_FILE)
    if ([pair_name(fmt) for fmt in plan.any_formats()] != tuned["plan"]
            or plan.page_size not in (None, tuned["page_size"])):
        raise UserError(f"{run_dir / PLAN_FILE} is not the plan of the run's samples: repeat the run with force=true.")


def publish(run_dirs: Sequence[Path], folder: Path) -> list[Path]:
    """Copy, tabulate and draw; returns what was written. Raises UserError, before it writes, if a run cannot be."""
    new = {run_dir.name: run_dir for run_dir in run_dirs}

    def tables_of(records: Sequence[RunRecord]) -> dict[str, str]:
        return _tables([(record, new.get(record.name, folder / record.name)) for record in records])

    *paths, _ = publish_runs(run_dirs, folder, "tune", tables_of, (PLAN_FILE,))
    for kept in (folder / name for name in new):
        paths += [kept / PLAN_FILE, write_report(kept), *write_figures(kept)]
    return [*paths, write_sums(folder)]


def tables(folder: Path) -> dict[str, str]:
    """{file name: text} of what the records of a published folder give."""
    return _tables([(record, folder / record.name) for record in published_runs(folder, "tune")])


def _tables(runs: Sequence[tuple[RunRecord, Path]]) -> dict[str, str]:
    return {CSV_FILE: to_csv(table_of(runs))}


def main(arguments: Sequence[str]) -> None:
    publish_main(__doc__, arguments, publish)


if __name__ == "__main__":
    main(sys.argv[1:])
