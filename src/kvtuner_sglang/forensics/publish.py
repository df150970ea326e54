"""Finished runs of task=forensics -> a published folder: records and samples, one table, figure, paragraph and README.

    python -m kvtuner_sglang.forensics.publish RUN_DIR... runs/published/forensics

A run replaces the published one of the same name; everything else is made anew from all runs in the folder.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from kvtuner_sglang.evidence.published import publish_main, publish_runs, published_runs, write_sums
from kvtuner_sglang.evidence.record import RunRecord
from kvtuner_sglang.evidence.tidy_tables import to_csv
from kvtuner_sglang.forensics.claimed import claimed
from kvtuner_sglang.forensics.figure import write_figure
from kvtuner_sglang.forensics.report import memory_table, paragraph, sections
from kvtuner_sglang.forensics.table import TABLE_FILE, table_of
from kvtuner_sglang.report.ablation import command_line

PARAGRAPH_FILE, README_FILE = "paragraph.md", "README.md"


def ordered(records: Iterable[RunRecord]) -> list[RunRecord]:
    """Quantized runs first, as the seed's was; the first one is the run of figure and paragraph."""
    return sorted(records, key=lambda record: (record.kv is not None and not record.kv.enabled, record.name))


def published(folder: Path) -> list[RunRecord]:
    """Every run of the folder, in order."""
    return ordered(published_runs(folder, "forensics"))


def publish(run_dirs: Sequence[Path], folder: Path) -> list[Path]:
    """Copy, tabulate, draw and describe; returns what was written. Raises UserError, before it writes, if it cannot."""
    *paths, _ = publish_runs(run_dirs, folder, "forensics", lambda records: _tables(ordered(records)))
    return [*paths, *write_figure(folder), write_sums(folder)]


def tables(folder: Path) -> dict[str, str]:
    """{file name: text} of what the records of a published folder give: table, paragraph and README."""
    return _tables(published(folder))


def _tables(records: Sequence[RunRecord]) -> dict[str, str]:
    return {TABLE_FILE: to_csv(table_of(records)), PARAGRAPH_FILE: paragraph(records[0], claimed()) + "\n",
            README_FILE: readme(records)}


def readme(records: Sequence[RunRecord]) -> str:
    """What the folder holds and what was found, from the records."""
    first = records[0]
    runs = "\n".join(command_line(record) for record in records)
    figure = Path(TABLE_FILE).with_suffix(".png").name
    parts = [
        "# How the seed report came by its figures",
        "Made by `python -m kvtuner_sglang.forensics.publish`; every figure below is that of a record or of the seed "
        "report's own tables, which `src/kvtuner_sglang/forensics/seed_report_2026-02-13.yaml` repeats as claims.",
        f"```\n{runs}\npython -m kvtuner_sglang.forensics.publish runs/forensics-* runs/published/forensics\n```",
        f"`*/record.json` and `*/requests.jsonl`: each run and its samples, node 1's replies among them with their "
        f"status and body (`kind` node1_reply and node1_loaded_reply). `{TABLE_FILE}`: all of it, tidy. "
        f"`{PARAGRAPH_FILE}`: the first paragraph below.",
        *sections(first, claimed()), f"![]({figure})", memory_table(records),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str]) -> None:
    publish_main(__doc__, arguments, publish)


if __name__ == "__main__":
    main(sys.argv[1:])
