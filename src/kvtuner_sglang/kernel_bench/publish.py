"""A finished run of task=kernels -> a published folder: its record and samples, one tidy table and two figures a GPU.

    python -m kvtuner_sglang.kernel_bench.publish RUN_DIR runs/published/kernels

A run replaces the published one of the same GPU, so that a table never mixes runs.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.published import require_commit, slug, write_sums
from kvtuner_sglang.evidence.record import RECORD_FILE, RunRecord, file_sha256, load_record
from kvtuner_sglang.evidence.samples import SAMPLES_FILE
from kvtuner_sglang.kernel_bench.figures import write_figures
from kvtuner_sglang.kernel_bench.tidy import gpu_of, table_of_run, write_table


def publishable(run_dir: Path) -> RunRecord:
    """The record of run_dir; raises UserError unless it is a whole, finished run of task=kernels."""
    record = load_record(run_dir)
    if record.config.get("task") != "kernels":
        raise UserError(f"{run_dir} holds a run of task={record.config.get('task')}: give one of task=kernels.")
    if record.status != "ok":
        raise UserError(f"{run_dir} is {record.status} ({record.reason}), so it has no figures to publish.")
    samples = run_dir / record.samples.file
    if not samples.exists() or file_sha256(samples) != record.samples.sha256:
        raise UserError(f"{samples} is not what the record says: repeat the run with force=true.")
    require_commit(record, run_dir)
    return record


def publish(run_dir: Path, folder: Path) -> list[Path]:
    """Copy and draw; returns what was written. Raises UserError if the run cannot be published."""
    record = publishable(run_dir)
    name = slug(gpu_of(record))
    table = table_of_run(run_dir, record)
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / name
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    for file in (RECORD_FILE, SAMPLES_FILE):
        shutil.copyfile(run_dir / file, kept / file)
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
