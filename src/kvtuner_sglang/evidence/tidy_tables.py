"""Tidy tables of published folders: how they are written, and folders that have one for each machine."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvtuner_sglang.evidence.published import publish_runs, published_runs, slug
from kvtuner_sglang.evidence.record import RunRecord

if TYPE_CHECKING:
    import pandas as pd

FLOAT_FORMAT = "%.6g"


def to_csv(frame: "pd.DataFrame") -> str:
    """As every table of runs/published is written."""
    return str(frame.to_csv(index=False, float_format=FLOAT_FORMAT))


@dataclass(frozen=True)
class MachineTables:
    """A published folder of runs of `task`: their records and samples, and <machine>.csv for each machine.

    table_of: records -> rows, of which the column `machine` says where they were measured; raises UserError if the
    records do not belong in one table.  also: records -> {file name: text} of what else is made from them.
    """

    task: str
    table_of: "Callable[[Iterable[RunRecord]], pd.DataFrame]"
    machine: str = "machine"
    also: Callable[[Sequence[RunRecord]], dict[str, str]] = lambda _records: {}

    def publish(self, run_dirs: Sequence[Path], folder: Path) -> list[Path]:
        """Copy and tabulate; returns what was written. Raises UserError, before it writes, if a run cannot be.

        A run replaces the published one of the same name; the tables are made anew from all runs in the folder.
        """
        return publish_runs(run_dirs, folder, self.task, self._texts)

    def tables(self, folder: Path) -> dict[str, str]:
        """{file name: text} of what the records of a published folder give."""
        return self._texts(published_runs(folder, self.task))

    def _texts(self, records: Sequence[RunRecord]) -> dict[str, str]:
        by_machine = self.table_of(records).groupby(self.machine)
        return {f"{slug(str(name))}.csv": to_csv(rows) for name, rows in by_machine} | self.also(records)
