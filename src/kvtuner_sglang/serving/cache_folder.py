"""What is computed once per machine and kept between runs: converted checkpoints, checksums of large files."""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvtuner_sglang.errors import UserError


def cache_folder(name: str) -> Path:
    """The folder `name` in $KVTUNER_CACHE, else $XDG_CACHE_HOME/kvtuner-sglang, else ~/.cache/kvtuner-sglang.

    Made if it is not there; raises UserError if that cannot be.
    """
    own, shared = os.environ.get("KVTUNER_CACHE"), os.environ.get("XDG_CACHE_HOME")
    root = Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "kvtuner-sglang"
    folder = root / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise UserError(f"The cache {folder} cannot be written: set KVTUNER_CACHE to a folder that can.")
    return folder


@contextmanager
def one_at_a_time(lock: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds `lock` against other processes; calls `waiting` once if another one has it. Ends with its process."""
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def cached_sha256(*files: Path, reading: Callable[[Path], None] = lambda file: None) -> str:
    """Hex sha256 of one file, or of the lines "sha256  name" of several; remembered by path, size and change time.

    reading: called before a file is read that is not remembered.
    """
    if len(files) > 1:
        listing = "".join(f"{cached_sha256(file, reading=reading)}  {file.name}\n" for file in files)
        return hashlib.sha256(listing.encode()).hexdigest()
    (file,) = files
    state = file.stat()
    key = f"{file.resolve()} {state.st_size} {state.st_mtime_ns}"
    note = cache_folder("sha256") / hashlib.sha256(key.encode()).hexdigest()
    if note.is_file():
        return note.read_text()
    reading(file)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    # Renamed into place: a reader never sees half a line.
    fresh = note.with_suffix(f".{os.getpid()}")
    fresh.write_text(digest)
    fresh.rename(note)
    return digest
