"""Finished runs of task=speed -> a published folder: their records and samples, a tidy table for each GPU.

    python -m kvtuner_sglang.speed.publish RUN_DIR... runs/published/engine

A run replaces the published one of the same name; tables are made anew from all runs in the folder.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from kvtuner_sglang.evidence.published import publish_main, publish_runs, published_runs, slug
from kvtuner_sglang.evidence.record import RunRecord
from kvtuner_sglang.speed.tidy import table_of, to_csv


def published(folder: Path) -> list[RunRecord]:
    """Every run of the folder, by name."""
    return published_runs(folder, "speed")


def publish(run_dirs: Sequence[Path], folder: Path) -> list[Path]:
    """Copy and tabulate; returns what was written. Raises UserError, before it writes, if a run cannot be."""
    return publish_runs(run_dirs, folder, "speed", _tables)


def tables(folder: Path) -> dict[str, str]:
    """{file name: text} of what the records of a published folder give."""
    return _tables(published(folder))


def _tables(records: Sequence[RunRecord]) -> dict[str, str]:
    return {f"{slug(str(gpu))}.csv": to_csv(rows) for gpu, rows in table_of(records).groupby("gpu")}


def main(arguments: Sequence[str]) -> None:
    publish_main(__doc__, arguments, publish)


if __name__ == "__main__":
    main(sys.argv[1:])
