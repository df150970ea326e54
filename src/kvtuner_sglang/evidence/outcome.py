"""What one job of run.py ends with, so that a sweep can list it without knowing the task."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """`run_dir`: None for a task that leaves no record. `skipped`: a finished record was already there. `reason` says
    why a status is not ok."""

    run_dir: Path | None
    status: str
    skipped: bool
    reason: str | None
