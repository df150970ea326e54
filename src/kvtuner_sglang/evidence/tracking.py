"""W&B as a mirror of a finished record.

The record is written first and stays true whatever happens here: W&B runs in a process of its own, with a bound on its
time, and a failure becomes a sentence in `record.tracking`.  Everything that it writes stays inside the run directory.

    python -m kvtuner_sglang.evidence.tracking RUN_DIR        # the child process
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kvtuner_sglang.evidence.record import RECORD_FILE, RunRecord, Tracking, load_record, write_record
from kvtuner_sglang.evidence.samples import SAMPLES_FILE

REPORT_FILE = "report.md"
TRACKING_LOG = "wandb.log"
TIMEOUT_S = {"offline": 60.0, "online": 300.0}
PRIVATE_DIRECTORIES = ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR")


def mirror(run_dir: Path, command: Sequence[str] = (sys.executable, "-m", "kvtuner_sglang.evidence.tracking"),
           timeout_s: float | None = None) -> Tracking:
    """Mirror run_dir's record to W&B and note in the record how that went; returns the note and never raises for W&B.

    `command` is what mirrors, given the run directory as its argument; timeout_s defaults by mode.
    """
    record = load_record(run_dir)
    mode, group = record.tracking.mode, record.tracking.group
    if mode == "disabled":
        tracking = Tracking(mode=mode, status="disabled", group=group)
    else:
        reason = _failure([*command, str(run_dir)], run_dir, timeout_s or TIMEOUT_S[mode])
        tracking = Tracking(mode=mode, status="failed" if reason else "ok", reason=reason, group=group)
    write_record(run_dir, record.model_copy(update={"tracking": tracking}))
    return tracking


def _failure(command: list[str], run_dir: Path, timeout_s: float) -> str | None:
    """Run the child in its own process group; returns why it failed, or None. Its output goes to wandb.log."""
    log_path = run_dir / TRACKING_LOG
    with log_path.open("w", encoding="utf-8") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
                                 env=_environment(run_dir))
        try:
            code = child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return f"W&B did not finish within {timeout_s:g} s; see {TRACKING_LOG}"
        finally:
            _kill_group(child)
    if code == 0:
        return None
    lines = [line for line in log_path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"W&B ended with exit code {code}: {lines[-1] if lines else 'it said nothing'}"


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """W&B's own service process may outlive the child, or hang with it."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all of them have ended
    finally:
        child.wait()


def _environment(run_dir: Path) -> dict[str, str]:
    """This process's environment with every place W&B writes to moved into the run directory."""
    private = str((run_dir / "wandb").resolve())
    return {**os.environ, **{name: f"{private}/.{name[6:-4].lower()}" for name in PRIVATE_DIRECTORIES},
            "WANDB_DIR": str(run_dir.resolve()), "WANDB_SILENT": "true", "WANDB_DISABLE_GIT": "true",
            "WANDB_DISABLE_CODE": "true", "WANDB_ERROR_REPORTING": "false"}


def flat_metrics(record: RunRecord) -> dict[str, float]:
    """{"ttft_ms/prompt_tokens=10/p50": 81.2, ...}, with the capacity beside it, as W&B shows it."""
    flat = {f"{key}/{name}": value for key, metric in record.metrics.items()
            for name, value in metric.model_dump(exclude={"unit"}).items()}
    if record.kv is not None:
        flat |= {"kv/tokens": record.kv.tokens, "kv/effective_bits": record.kv.effective_bits}
    return flat


def log_to_wandb(run_dir: Path) -> None:
    """Write one W&B run with the record's configuration and metrics, and record, samples and report as an artifact."""
    import wandb  # here, because a missing or broken W&B must fail only this process

    record = load_record(run_dir)
    (run_dir / "wandb").mkdir(exist_ok=True)
    with wandb.init(
        project=record.config["tracking"]["project"], dir=str(run_dir), mode=record.tracking.mode, name=record.name,
        group=record.tracking.group, job_type=record.config["task"],
        config={**record.config, "config_hash": record.config_hash, "git_sha": record.environment.git_sha},
        settings=wandb.Settings(console="off", x_disable_stats=True, x_disable_meta=True),
    ) as run:
        run.summary.update({"status": record.status, "reason": record.reason, **flat_metrics(record)})
        artifact = wandb.Artifact(name=record.name, type="run")
        for name in (RECORD_FILE, SAMPLES_FILE, REPORT_FILE):
            if (run_dir / name).exists():  # a run that failed early has no report of samples
                artifact.add_file(str(run_dir / name))
        run.log_artifact(artifact)


if __name__ == "__main__":
    log_to_wandb(Path(sys.argv[1]))
