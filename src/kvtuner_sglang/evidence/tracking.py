"""W&B as a mirror of a finished record.

The record is written first and stays true whatever happens here: W&B runs in a process of its own, with a bound on its
time, and a failure becomes a sentence in `record.tracking`.  Everything that it writes stays inside the run directory.
tracking=online goes to the server that W&B's own settings name (`wandb login --host`, WANDB_BASE_URL, WANDB_API_KEY).
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kvtuner_sglang.evidence.record import Tracking, load_record, write_record

MIRROR = (sys.executable, "-m", "kvtuner_sglang.evidence.wandb_run")
TRACKING_LOG = "wandb.log"
EXCEPTION = re.compile(r"[\w.]+(Error|Exception): ")
TIMEOUT_S = {"offline": 60.0, "online": 300.0}
PRIVATE_DIRECTORIES = ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR")
SETTINGS_DIRECTORY = "WANDB_CONFIG_DIR"  # the user's own where a server is asked for: it says which


def mirror(run_dir: Path, command: Sequence[str] = MIRROR, timeout_s: float | None = None) -> Tracking:
    """Mirror run_dir's record to W&B and note in the record how that went; returns the note and never raises for W&B.

    `command` is what mirrors, given the run directory as its argument; timeout_s defaults by mode.
    """
    record = load_record(run_dir)
    mode, group = record.tracking.mode, record.tracking.group
    if mode == "disabled":
        tracking = Tracking(mode=mode, status="disabled", group=group)
    else:
        reason = _failure([*command, str(run_dir)], run_dir, mode, timeout_s or TIMEOUT_S[mode])
        tracking = Tracking(mode=mode, status="failed" if reason else "ok", reason=reason, group=group)
    write_record(run_dir, record.model_copy(update={"tracking": tracking}))
    return tracking


def _failure(command: list[str], run_dir: Path, mode: str, timeout_s: float) -> str | None:
    """Run the child in its own process group; returns why it failed, or None. Its output goes to wandb.log."""
    log_path = run_dir / TRACKING_LOG
    with log_path.open("w", encoding="utf-8") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
                                 env=environment(run_dir, mode))
        try:
            code = child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return f"W&B did not finish within {timeout_s:g} s; see {TRACKING_LOG}"
        finally:
            _kill_group(child)
    if code == 0:
        return None
    return f"W&B ended with exit code {code}: {_last_words(log_path.read_text(encoding='utf-8', errors='replace'))}"


def _last_words(log: str) -> str:
    """The last exception of a log, of which W&B's have several lines, or its last line."""
    lines = [line for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if EXCEPTION.match(line)]
    return [*lines, *errors][-1] if lines else "it said nothing"


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """W&B's own service process may outlive the child, or hang with it."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all of them have ended
    finally:
        child.wait()


def environment(run_dir: Path, mode: str) -> dict[str, str]:
    """This process's environment with every place W&B writes to moved into the run directory."""
    private = str((run_dir / "wandb").resolve())
    moved = PRIVATE_DIRECTORIES if mode == "online" else (*PRIVATE_DIRECTORIES, SETTINGS_DIRECTORY)
    return {**os.environ, **{name: f"{private}/.{name[6:-4].lower()}" for name in moved},
            "WANDB_DIR": str(run_dir.resolve()), "WANDB_SILENT": "true", "WANDB_DISABLE_GIT": "true",
            "WANDB_DISABLE_CODE": "true", "WANDB_ERROR_REPORTING": "false"}
