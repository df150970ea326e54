"""What every published folder has: whole runs of known commits, names made of the GPU's, checksums of all files."""

import itertools
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.machine_paths import forget_machine_paths
from kvtuner_sglang.evidence.record import RECORD_FILE, RunRecord, file_sha256, load_record
from kvtuner_sglang.evidence.samples import SAMPLES_FILE

SUMS_FILE = "SHA256SUMS"
ALIKE = ("workload", "server", "seed")  # what runs that are compared have in common


def slug(gpu: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "nvidia_h100_80gb_hbm3"."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_")


def write_sums(folder: Path) -> Path:
    """SHA256SUMS of every file of the folder, as `sha256sum -c` reads it."""
    sums = folder / SUMS_FILE
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != sums)
    sums.write_text("".join(f"{file_sha256(path)}  {path.relative_to(folder)}\n" for path in files))
    return sums


def publishable(run_dir: Path, task: str) -> RunRecord:
    """The record of run_dir; raises UserError unless it is a whole, finished run of `task` at a known commit."""
    record = load_record(run_dir)
    if record.config.get("task") != task:
        raise UserError(f"{run_dir} holds a run of task={record.config.get('task')}: give one of task={task}.")
    if record.status != "ok":
        raise UserError(f"{run_dir} is {record.status} ({record.reason}), so it has no figures to publish.")
    samples = run_dir / record.samples.file
    if not samples.exists() or file_sha256(samples) != record.samples.sha256:
        raise UserError(f"{samples} is not what the record says: repeat the run with force=true.")
    if record.environment.git_sha is None or record.environment.git_dirty is not False:
        raise UserError(f"{run_dir} was measured on a checkout that no commit describes: commit, then run again.")
    return record


def copy_run(run_dir: Path, target: Path, files: Sequence[str] = ()) -> None:
    """Record, samples and `files` of a run in place of what `target` held, if that is not the run itself."""
    if target.resolve() != run_dir.resolve():
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for file in (RECORD_FILE, SAMPLES_FILE, *files):
            shutil.copyfile(run_dir / file, target / file)
    forget_machine_paths(target)


def published_runs(folder: Path, task: str) -> list[RunRecord]:
    """Every run of a published folder, by name; raises UserError if one cannot be published."""
    return sorted((publishable(path.parent, task) for path in folder.glob(f"*/{RECORD_FILE}")),
                  key=lambda record: record.name)


def publish_runs(run_dirs: Sequence[Path], folder: Path, task: str,
                 tables_of: Callable[[Sequence[RunRecord]], dict[str, str]], files: Sequence[str] = ()) -> list[Path]:
    """Copy runs, and make all tables, file name -> text, anew from old and new ones; returns what was written.

    files: what is copied of a run besides its record and samples.  Raises UserError, before it writes, if a run cannot
    be published.
    """
    found = {run_dir.name: publishable(run_dir, task) for run_dir in run_dirs}
    for run_dir, file in itertools.product(run_dirs, files):
        if not (run_dir / file).is_file():
            raise UserError(f"{run_dir} has no {file}: repeat the run with force=true.")
    kept = [record for record in published_runs(folder, task) if record.name not in found]
    tables_of(sorted([*kept, *found.values()], key=lambda record: record.name))  # raises before anything is written
    for run_dir in run_dirs:
        copy_run(run_dir, folder / run_dir.name, files)
    texts = tables_of(published_runs(folder, task))  # as they are published: without paths of this machine
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [*(folder / name for name in texts), write_sums(folder)]


def require_comparable(records: Sequence[RunRecord], apart: Sequence[str] = ()) -> None:
    """Raise UserError for two runs of one cell, or for runs of one machine with unlike workload, server or seed.

    A cell is a machine, model, dist and quant.  apart: further parts of the configuration, "workload" for example, that
    by their names make cells and comparisons of their own.
    """
    cells: dict[tuple[str, ...], RunRecord] = {}
    first: dict[tuple[str, ...], RunRecord] = {}
    for record in records:
        of_machine = (record.environment.hardware, *(record.config[part]["name"] for part in apart))
        model, dist, quant = (record.config[part]["name"] for part in ("model", "dist", "quant"))
        other = cells.setdefault((*of_machine, model, dist, quant), record)
        if other is not record:
            raise UserError(f"{record.name} and {other.name} are both {quant} on {dist}: publish one of them.")
        for part in ALIKE:
            if _found(record, part) != _found(like := first.setdefault(of_machine, record), part):
                raise UserError(f"{record.name} has another {part} than {like.name}: publish runs that differ in "
                                "model, quant and dist alone.")


def _found(record: RunRecord, part: str) -> Any:
    """A part of its configuration; of the server with the device that auto found."""
    value = record.config[part]
    if part == "server" and value["device"] == "auto":
        return value | {"device": record.environment.auto_device}
    return value


def publish_main(help_text: str | None, arguments: Sequence[str],
                 publish: Callable[[Sequence[Path], Path], list[Path]], most_runs: int | None = None) -> None:
    """RUN_DIR... FOLDER on the command line of a publish module: publish, list what was written, or exit saying why."""
    if "--help" in arguments:
        sys.stdout.write(help_text or "")
        return
    *run_dirs, folder = map(Path, arguments) if len(arguments) > 1 else (Path(),)
    if not run_dirs or (most_runs is not None and len(run_dirs) > most_runs):
        sys.exit(help_text)
    try:
        paths = publish(run_dirs, folder)
    except UserError as error:
        sys.exit(f"kvtuner: {error}")
    sys.stdout.write("".join(f"{path}\n" for path in paths))
