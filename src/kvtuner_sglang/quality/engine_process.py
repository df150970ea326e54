"""Start an engine process, pass on its progress, bound its time and leave nothing of it behind."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from kvtuner_sglang.errors import MeasurementInvalid, RunFailed
from kvtuner_sglang.quality.engine_spec import EngineResult, EngineSpec

REFUSED = "refused: "


def engine_command(spec_path: Path, result_path: Path) -> list[str]:
    return [sys.executable, "-m", "kvtuner_sglang.quality.engine_run", str(spec_path), str(result_path)]


def engine_environment(device: str) -> dict[str, str]:
    """What is added to the environment of the process."""
    added = {"SGLANG_LOGPROB_CHUNK_SIZE": "512"}  # rows of logits at once: a whole window would take gigabytes
    if device == "cpu":
        from kvtuner_sglang.cpu_engine.environment import cpu_server_environment

        return added | cpu_server_environment(1, 1, 0, interface="lo")
    return added | {"SGLANG_IS_FLASHINFER_AVAILABLE": "false"}  # not needed, and it would compile for a minute


def run_engine(spec: EngineSpec, timeout_s: float, log_path: Path, say: Callable[[str], None]) -> EngineResult:
    """Run engine_run on `spec` and read its result; `log_path` gets all that SGLang says.

    Raises MeasurementInvalid with the process's own sentence, or RunFailed naming its log, if it does not end well
    within `timeout_s`. No process of it is left, however this returns.
    """
    folder = Path(spec.out_dir)
    spec_path, result_path = folder / "spec.json", folder / "result.json"
    spec.write(spec_path)
    result_path.unlink(missing_ok=True)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("w") as log:
        process = subprocess.Popen(
            engine_command(spec_path, result_path), stdout=subprocess.PIPE, stderr=log, text=True,
            env=os.environ | engine_environment(spec.device), start_new_session=True,
        )
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
    if not result_path.exists():
        raise RunFailed(f"the engine process ended without a result (exit status {process.returncode}, bound "
                        f"{timeout_s:g} s): see {log_path}.")
    return EngineResult.read(result_path)


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
