"""An engine process for one EngineSpec: its command, its environment, its result."""

import sys
from collections.abc import Callable
from pathlib import Path

from kvtuner_sglang.errors import RunFailed
from kvtuner_sglang.quality.engine_spec import EngineResult, EngineSpec
from kvtuner_sglang.serving.bounded_process import run_bounded


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
    status = run_bounded(engine_command(spec_path, result_path), engine_environment(spec.device), timeout_s, log_path,
                         say)
    if not result_path.exists():
        raise RunFailed(f"the engine process ended without a result (exit status {status}, bound {timeout_s:g} s): "
                        f"see {log_path}.")
    return EngineResult.read(result_path)
