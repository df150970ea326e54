"""What every published folder has: whole runs of known commits, names made of the GPU's, checksums of all files."""

import re
import shutil
from pathlib import Path

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.record import RECORD_FILE, RunRecord, file_sha256, load_record
from kvtuner_sglang.evidence.samples import SAMPLES_FILE

SUMS_FILE = "SHA256SUMS"


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


def copy_run(run_dir: Path, target: Path) -> None:
    """Record and samples of a run in place of what `target` held; nothing to do if it is the run itself."""
    if target.resolve() == run_dir.resolve():
        return
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in (RECORD_FILE, SAMPLES_FILE):
        shutil.copyfile(run_dir / file, target / file)
