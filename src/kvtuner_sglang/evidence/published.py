"""What every published folder has: names made of the GPU's, checksums of all its files, records of a known commit."""

import re
from pathlib import Path

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.record import RunRecord, file_sha256

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


def require_commit(record: RunRecord, where: Path) -> None:
    """Raise UserError unless the record names the commit that gave its figures."""
    if record.environment.git_sha is None or record.environment.git_dirty is not False:
        raise UserError(f"{where} was measured on a checkout that no commit describes: commit, then run again.")
