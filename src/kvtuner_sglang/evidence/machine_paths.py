"""What is published names no folder of the machine that it was made on: the project's is `.`, the home folder `~`.

A run's own record keeps them whole, so that its commands can be given again as they are.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from kvtuner_sglang.evidence.environment import PROJECT_ROOT
from kvtuner_sglang.evidence.record import RECORD_FILE, file_sha256, write_atomically
from kvtuner_sglang.evidence.samples import SAMPLES_FILE

PROJECT = {str(PROJECT_ROOT): "."}
FOLDERS = PROJECT | ({str(Path.home()): "~"} if Path.home() != Path("/") else {})
HOMES = re.compile(r"(?<![\w.~/-])/(home|root|Users)(?![\w.-])")  # of whoever ran, here or elsewhere


def has_machine_paths(text: str) -> bool:
    """Whether it names this checkout's folder, or any user's home folder."""
    return HOMES.search(text) is not None or without_machine_paths(text, PROJECT) != text


def without_machine_paths(text: str, folders: Mapping[str, str]) -> str:
    """Every folder, where it is a whole path or begins one, by its name; of two that match the longer one."""
    longest_first = sorted(folders, key=len, reverse=True)
    paths = "|".join(re.escape(folder) for folder in longest_first)
    return re.sub(rf"(?<![\w.~/-])({paths})(?![\w.-])", lambda found: folders[found[0]], text)


def forget_machine_paths(run_dir: Path, folders: Mapping[str, str] = FOLDERS) -> None:
    """Rewrite a run's samples and record, which says their checksum, in place; both stay what they were otherwise."""
    samples, record = run_dir / SAMPLES_FILE, run_dir / RECORD_FILE
    before = file_sha256(samples)
    for path in (samples, record):
        old = path.read_text(encoding="utf-8")
        if (new := without_machine_paths(old, folders)) != old:
            write_atomically(path, new)
    if (after := file_sha256(samples)) != before:
        write_atomically(record, record.read_text(encoding="utf-8").replace(before, after))
