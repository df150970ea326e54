"""Start a process, pass on its progress, bound its time and leave nothing of it behind."""

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kvtuner_sglang.errors import MeasurementInvalid

REFUSED = "refused: "


def run_bounded(command: Sequence[str], environment: Mapping[str, str], timeout_s: float, log_path: Path,
                say: Callable[[str], None]) -> int:
    """Exit status of `command`; its stdout goes to `say` line by line, its stderr to `log_path`.

    `environment` is added to this process's own.  A line "refused: SENTENCE" raises MeasurementInvalid(SENTENCE).  Its
    whole process group is killed after `timeout_s` and at the end, however this returns.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True,
                                   env=os.environ | dict(environment), start_new_session=True)
        timer = threading.Timer(timeout_s, _kill_group, [process.pid])
        timer.start()
        try:
            refused = _follow(process, say)
        finally:
            timer.cancel()
            _kill_group(process.pid)
            process.wait()
    if refused is not None:
        raise MeasurementInvalid(refused)
    return process.returncode


def _follow(process: subprocess.Popen[str], say: Callable[[str], None]) -> str | None:
    """Pass on every line until the process ends; its refusal, if it made one."""
    refused = None
    for line in process.stdout or ():
        text = line.rstrip("\n")
        if text.startswith(REFUSED):
            refused = text.removeprefix(REFUSED)
        else:
            say(text)
    process.wait()
    return refused


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
