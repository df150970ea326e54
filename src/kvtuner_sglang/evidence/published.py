"""What every published folder has: names made of the GPU's, and a checksum of every file."""

import re
from pathlib import Path

from kvtuner_sglang.evidence.record import file_sha256

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
