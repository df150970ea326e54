"""Finished runs of task=speed -> a published folder: their records and samples, a tidy table for each GPU.

    python -m kvtuner_sglang.speed.publish RUN_DIR... runs/published/engine

A run replaces the published one of the same name; tables are made anew from all runs in the folder.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.published import copy_run, publishable, slug, write_sums
from kvtuner_sglang.evidence.record import RunRecord
from kvtuner_sglang.speed.tidy import table_of, to_csv


def published(folder: Path) -> list[RunRecord]:
    """Every run of the folder, by name."""
    return [publishable(path.parent, "speed") for path in sorted(folder.glob("*/record.json"))]


def publish(run_dirs: Sequence[Path], folder: Path) -> list[Path]:
    """Copy and tabulate; returns what was written. Raises UserError, before it writes, if a run cannot be."""
    found = {run_dir.name: (run_dir, publishable(run_dir, "speed")) for run_dir in run_dirs}
    kept = [record for record in published(folder) if record.name not in found]
    records = sorted([*kept, *(record for _, record in found.values())], key=lambda record: record.name)
    texts = _tables(records)
    for name, (run_dir, _) in found.items():
        copy_run(run_dir, folder / name)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [*(folder / name for name in texts), write_sums(folder)]


def tables(folder: Path) -> dict[str, str]:
    """{file name: text} of what the records of a published folder give."""
    return _tables(published(folder))


def _tables(records: Sequence[RunRecord]) -> dict[str, str]:
    return {f"{slug(str(gpu))}.csv": to_csv(rows) for gpu, rows in table_of(records).groupby("gpu")}


def main(arguments: Sequence[str]) -> None:
    if len(arguments) < 2:
        sys.exit(__doc__)
    try:
        paths = publish([Path(word) for word in arguments[:-1]], Path(arguments[-1]))
    except UserError as error:
        sys.exit(f"kvtuner: {error}")
    sys.stdout.write("".join(f"{path}\n" for path in paths))


if __name__ == "__main__":
    main(sys.argv[1:])
