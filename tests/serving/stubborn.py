"""A process tree that does what a broken server could do; run as a node by the tests of teardown and liveness.

usage: stubborn.py FOLDER WORD...
Words: "deaf" ignores SIGTERM; "child" has a child in its group; "session" has one in a session of its own;
"orphan" has one in a session of its own whose parent is gone.  Every process writes FOLDER/<role>.pid.
"""

import os
import signal
import sys
import time
from pathlib import Path


def live(folder: Path, role: str) -> None:
    draft = folder / f"{role}.tmp"
    draft.write_text(str(os.getpid()))
    draft.replace(folder / f"{role}.pid")
    while True:
        time.sleep(0.1)


def main() -> None:
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    if "deaf" in words:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "child" in words and os.fork() == 0:
        live(folder, "child")
    if "session" in words and os.fork() == 0:
        os.setsid()
        live(folder, "session")
    if "orphan" in words and os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            live(folder, "orphan")
        os._exit(0)
    live(folder, "main")


if __name__ == "__main__":
    main()
