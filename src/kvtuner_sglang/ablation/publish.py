"""Finished runs of exp=ablation -> a published folder: their records and samples, and a tidy table for each machine.

    python -m kvtuner_sglang.ablation.publish runs/serve-*-ablation-* runs/published/ablation

A run replaces the published one of the same name; the tables are made anew from all runs in the folder.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from kvtuner_sglang.ablation.tidy import table_of, to_csv
from kvtuner_sglang.evidence.published import publish_main, publish_runs, published_runs, slug
from kvtuner_sglang.evidence.record import RunRecord


def published(folder: Path) -> list[RunRecord]:
    """Every run of the folder, by name."""
    return published_runs(folder, "serve")


def publish(run_dirs: Sequence[Path], folder: Path) -> list[Path]:
    """Copy and tabulate; returns what was written. Raises UserError, before it writes, if a run cannot be."""
    return publish_runs(run_dirs, folder, "serve", _tables)


def tables(folder: Path) -> dict[str, str]:
    """{file name: text} of what the records of a published folder give."""
    return _tables(published(folder))


def _tables(records: Sequence[RunRecord]) -> dict[str, str]:
    return {f"{slug(str(machine))}.csv": to_csv(rows) for machine, rows in table_of(records).groupby("machine")}


def main(arguments: Sequence[str]) -> None:
    publish_main(__doc__, arguments, publish)


if __name__ == "__main__":
    main(sys.argv[1:])
