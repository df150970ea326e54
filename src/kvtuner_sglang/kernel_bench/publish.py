"""A finished run of task=kernels -> a published folder: its record and samples, one tidy table and two figures a GPU.

    python -m kvtuner_sglang.kernel_bench.publish RUN_DIR runs/published/kernels

A run replaces the published one of the same GPU, so that a table never mixes runs.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.published import copy_run, publishable, slug, write_sums
from kvtuner_sglang.evidence.record import RECORD_FILE
from kvtuner_sglang.evidence.samples import SAMPLES_FILE
from kvtuner_sglang.kernel_bench.figures import write_figures
from kvtuner_sglang.kernel_bench.tidy import gpu_of, table_of_run, write_table


def publish(run_dir: Path, folder: Path) -> list[Path]:
    """Copy and draw; returns what was written. Raises UserError if the run cannot be published."""
    record = publishable(run_dir, "kernels")
    name = slug(gpu_of(record))
    table = table_of_run(run_dir, record)
    kept = folder / name
    copy_run(run_dir, kept)
    path = write_table(table, folder / f"{name}.csv")
    return [kept / RECORD_FILE, kept / SAMPLES_FILE, path, *write_figures(path), write_sums(folder)]


def main(arguments: Sequence[str]) -> None:
    if len(arguments) != 2:
        sys.exit(__doc__)
    try:
        paths = publish(*map(Path, arguments))
    except UserError as error:
        sys.exit(f"kvtuner: {error}")
    sys.stdout.write("".join(f"{path}\n" for path in paths))


if __name__ == "__main__":
    main(sys.argv[1:])
