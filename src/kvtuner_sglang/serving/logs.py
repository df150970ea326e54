"""What a node's log says, in one line: what it is doing, or why it stopped."""

import re
from pathlib import Path

TAIL_BYTES = 256 * 1024
REFUSAL = re.compile(r"^kvtuner: (.+)$", re.MULTILINE)
# A traceback's last line, bare or behind a logger's stamp, or argparse's complaint.
ERROR = re.compile(r"(?:^|\] )(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt): .+$|error: .+$", re.MULTILINE)
# torch's, of a GPU and of a CPU, Python's, and SGLang's where weights leave no room for keys and values.
OUT_OF_MEMORY = re.compile(r"OutOfMemoryError|MemoryError|out of memory|not enough memory|can't allocate memory",
                           re.IGNORECASE)
STAMP = re.compile(r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?: [^\]]*)?\] ")
# The lines that mark a step of SGLang's start, out of the hundreds that do not.
STEPS = ("Init torch distributed", "Load weight", "KV Cache is allocated", "Capture", "Engine startup timings",
         "Dummy health check server", "Prefill batch", "The server is fired up")
LINE_LIMIT = 200
STEP_LIMIT = 60


def tail(log: Path) -> str:
    """The last part of the log; empty if there is none."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - TAIL_BYTES, 0))
        return file.read().decode(errors="replace")


def refusal(log: Path) -> str | None:
    """The sentence with which our plugin refused to start, or None."""
    found = REFUSAL.search(tail(log))
    return found.group(1).strip() if found else None


def last_error(log: Path) -> str | None:
    """The last line that names an error, or None."""
    found = ERROR.findall(tail(log))
    return found[-1].removeprefix("] ").strip()[:LINE_LIMIT] if found else None


def out_of_memory(log: Path) -> str | None:
    """The first error line that says that there was no memory, or None; what came after it is its effect."""
    found = (line.removeprefix("] ").strip()[:LINE_LIMIT] for line in ERROR.findall(tail(log)))
    return next((line for line in found if OUT_OF_MEMORY.search(line)), None)


def last_step(log: Path) -> str:
    """What the node last said it is doing, as SGLang logged it; before that it imports."""
    for line in reversed(tail(log).splitlines()):
        text = STAMP.sub("", line).strip()
        if text.startswith(STEPS):
            return text[:STEP_LIMIT]
    return "importing SGLang"
