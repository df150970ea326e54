"""The folder of one run: written by one process at a time, and never a half-made record in it."""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.evidence.record import RECORD_FILE


@contextlib.contextmanager
def run_directory(run_dir: Path) -> Iterator[None]:
    """An empty run_dir for the block; if the block ends without a record, what was there before comes back.

    Raises ConfigError if it cannot be written or another run is writing it.
    """
    previous = run_dir.with_name(f".{run_dir.name}.previous")
    with _lock(run_dir):
        if previous.exists() and not (run_dir / RECORD_FILE).exists():
            _restore(run_dir, previous)  # a run that was killed could not do it
        if run_dir.exists():
            shutil.rmtree(previous, ignore_errors=True)
            run_dir.rename(previous)
        run_dir.mkdir()
        try:
            yield
        finally:
            if (run_dir / RECORD_FILE).exists():
                shutil.rmtree(previous, ignore_errors=True)
            else:
                _restore(run_dir, previous)


def _restore(run_dir: Path, previous: Path) -> None:
    shutil.rmtree(run_dir, ignore_errors=True)
    if previous.exists():
        previous.rename(run_dir)


@contextlib.contextmanager
def _lock(run_dir: Path) -> Iterator[None]:
    path = run_dir.with_name(f".{run_dir.name}.lock")
    try:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise ConfigError(f"{run_dir.parent} cannot be written ({error.strerror}): choose another runs_dir.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another run is writing {run_dir}: wait for it or change the configuration.") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
