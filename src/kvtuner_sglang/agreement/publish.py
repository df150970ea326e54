"""Finished runs of task=agreement -> a published folder: their records and samples, one tidy table, a README.

    python -m kvtuner_sglang.agreement.publish RUN_DIR... runs/published/agreement

A run replaces the published one of the same name; table and README are made anew from all runs in the folder.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from kvtuner_sglang.agreement.compare import FLOORS
from kvtuner_sglang.agreement.tidy import table_of
from kvtuner_sglang.evidence.published import publish_main, publish_runs, published_runs
from kvtuner_sglang.evidence.record import RunRecord
from kvtuner_sglang.evidence.tidy_tables import to_csv

CSV_FILE = "agreement.csv"
README = f"""# Agreement of parallel layouts with one rank

Each row of `{CSV_FILE}` is one layout: the same greedy requests, token by token, put to servers of that layout and to
one server of one rank. `mean` and `max` are over |difference| of log-probabilities (nats) of all `tokens` up to the
first token that differs; `texts_equal` of `prompts` texts are equal in every token.

Low-bit codes amplify float noise, and another layout multiplies matrices of other shapes. So a quantized format is held
to its own noise floor, measured beside it: `floor_mean` and `floor_max` are the same figures of one rank whose keys and
values get relative noise (1e-6 in float32, 2^-10, the rounding itself, in bfloat16). `within` is true if mean and
maximum are at most {FLOORS} times the floor's or, without quantization, if all texts are equal.

Every figure comes from the records beside this file: `record.json` with all command lines, `requests.jsonl` with
every answer. Made by `python -m kvtuner_sglang.agreement.publish`.
"""


def published(folder: Path) -> list[RunRecord]:
    """Every run of the folder, by name."""
    return published_runs(folder, "agreement")


def publish(run_dirs: Sequence[Path], folder: Path) -> list[Path]:
    """Copy and tabulate; returns what was written. Raises UserError, before it writes, if a run cannot be."""
    return publish_runs(run_dirs, folder, "agreement", _tables)


def tables(folder: Path) -> dict[str, str]:
    """{file name: text} of what the records of a published folder give."""
    return _tables(published(folder))


def _tables(records: Sequence[RunRecord]) -> dict[str, str]:
    return {CSV_FILE: to_csv(table_of(records)), "README.md": README}


def main(arguments: Sequence[str]) -> None:
    publish_main(__doc__, arguments, publish)


if __name__ == "__main__":
    main(sys.argv[1:])
