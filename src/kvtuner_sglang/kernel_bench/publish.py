"""A finished run of task=kernels -> a published folder: its record and samples, one tidy table a GPU.

    python -m kvtuner_sglang.kernel_bench.publish RUN_DIR runs/published/kernels

A run replaces the published one of the same GPU, so that a table never mixes runs.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from kvtuner_sglang.evidence.published import copy_run, publish_main, publishable, slug, write_sums
from kvtuner_sglang.evidence.record import RECORD_FILE
from kvtuner_sglang.evidence.samples import SAMPLES_FILE
from kvtuner_sglang.evidence.tidy_tables import to_csv
from kvtuner_sglang.kernel_bench.tidy import gpu_of, table_of_run


def publish(run_dir: Path, folder: Path) -> list[Path]:
    """Copy and tabulate; returns what was written. Raises UserError if the run cannot be published."""
    record = publishable(run_dir, "kernels")
    name = slug(gpu_of(record))
    table = table_of_run(run_dir, record)
    kept = folder / name
    copy_run(run_dir, kept)
    path = folder / f"{name}.csv"
    path.write_text(to_csv(table))
    return [kept / RECORD_FILE, kept / SAMPLES_FILE, path, write_sums(folder)]


def tables(folder: Path) -> dict[str, str]:
    """{file name: text} of what the records of a published folder give."""
    runs = sorted(path.parent for path in folder.glob(f"*/{RECORD_FILE}"))
    return {f"{run_dir.name}.csv": to_csv(table_of_run(run_dir, publishable(run_dir, "kernels"))) for run_dir in runs}


def main(arguments: Sequence[str]) -> None:
    publish_main(__doc__, arguments, lambda run_dirs, folder: publish(run_dirs[0], folder), most_runs=1)


if __name__ == "__main__":
    main(sys.argv[1:])
