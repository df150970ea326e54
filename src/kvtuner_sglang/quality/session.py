"""Several formats of several models, a few at a time, on one machine; one table at the end:

    python -m kvtuner_sglang.quality.session --jobs 6 --out DIR --model smollm2_135m --model qwen=/checkpoint \\
        --quants kv4 bf16 kv8 [--minutes 9] [--set KEY=VALUE ...]

Every job is one `python run.py task=quality`, so a finished one is skipped when the session is started again.  A
session that runs out of minutes stops its jobs, reports what is there and exits with 3.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.record import RunRecord, load_record
from kvtuner_sglang.serving.teardown import signals_handled, termination_raises

PROJECT_ROOT = Path(__file__).resolve().parents[3]
POLL_S = 0.5
OUT_OF_TIME = 3
PUBLISHED = ("record.json", "requests.jsonl")
CUT_OFF = "engine/prose.json"  # of a run that was stopped after its prose


@dataclass
class Job:
    """One run.py; `log` holds all it said."""

    name: str
    overrides: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = field(default=None)

    def start(self) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([sys.executable, "run.py", "task=quality", *self.overrides],
                                            cwd=PROJECT_ROOT, stdout=log, stderr=log, start_new_session=True)

    def stop(self) -> None:
        """SIGTERM ends a run through its own cleaning up, which stops its engine."""
        if self.process is not None and self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGTERM)

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None


def model_overrides(word: str) -> list[str]:
    """"smollm2_135m" is a file of conf/model, "qwen=/checkpoint" a folder under a name of its own."""
    name, separator, path = word.partition("=")
    return ["model=local", f"model.name={name}", f"model.path={path}"] if separator else [f"model={name}"]


def build_jobs(arguments: argparse.Namespace, out: Path) -> list[Job]:
    """Each quant of every model in turn, so that the first jobs measure full precision of different models."""
    jobs = []
    for quant in arguments.quants:
        for model in arguments.model:
            name = f"{model.partition('=')[0]}-{quant}"
            overrides = [*model_overrides(model), f"quant={quant}", "tracking=disabled", f"runs_dir={out / 'runs'}",
                         *arguments.overrides]
            jobs.append(Job(name, overrides, out / f"{name}.log"))
    return jobs


def run_jobs(jobs: list[Job], at_once: int, deadline: float) -> bool:
    """Whether all ended in time; raises SystemExit if a signal asked to stop.  None is left running either way."""
    waiting = list(jobs)

    def unfinished() -> bool:
        return bool(waiting) or any(job.running for job in jobs)

    with _signals_noted() as noted:
        try:
            while unfinished() and not noted and time.monotonic() <= deadline:
                while waiting and not noted and sum(job.running for job in jobs) < at_once:
                    job = waiting.pop(0)
                    job.start()
                    _say(f"{job.name} started")
                time.sleep(POLL_S)
            in_time = not unfinished()
        finally:
            for job in jobs:
                job.stop()
            for job in jobs:
                if job.process is not None:
                    job.process.wait()
        if noted:
            raise SystemExit(128 + noted[0])
    return in_time


@contextlib.contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """Signals that ask to stop, as they came: none interrupts a start, which would orphan its run, nor the waiting."""
    noted: list[int] = []
    with signals_handled(lambda number, _frame: noted.append(number), signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        yield noted


def records(runs: Path) -> list[RunRecord]:
    """Those of finished runs, whatever their status."""
    found = []
    for path in sorted(runs.glob("quality-*/record.json")):
        found.append(load_record(path.parent))
    return found


def table(found: list[RunRecord]) -> str:
    """One line a run."""
    lines = [f"{'model':22s} {'quant':10s} {'bits':>6s} {'KL':>8s} {'se':>7s} {'top-1':>6s} {'ppl':>8s} {'recall':>7s} "
             f"{'diff 95 %':>16s} {'arith':>6s}"]
    for record in found:
        model, quant = record.config["model"]["name"], record.config["quant"]["name"]
        if record.kv is None:
            lines.append(f"{model:22s} {quant:10s} {record.status}: {record.reason}")
            continue
        mean = {name: metric.mean for name, metric in record.metrics.items()}
        interval = f"{mean.get('recall_difference_low', 0):+.3f}..{mean.get('recall_difference_high', 0):+.3f}"
        lines.append(f"{model:22s} {quant:10s} {record.kv.effective_bits:6.3f} {mean['kl_nats']:8.4f} "
                     f"{mean.get('kl_se_nats', 0):7.4f} {mean['top1_agreement']:6.3f} {mean['perplexity']:8.2f} "
                     f"{mean.get('recall', 0):7.3f} {interval:>16s} {mean.get('arithmetic', 0):6.3f}")
    return "\n".join(lines)


def cut_off(runs: Path) -> list[str]:
    """One line for every run that was stopped after its prose."""
    lines = []
    for path in sorted(runs.glob(f"quality-*/{CUT_OFF}")):
        if not (path.parents[1] / PUBLISHED[0]).is_file():
            rows = json.loads(path.read_text())["rows"]
            kl = [x for row in rows for x in row["kl"]]
            if kl:
                lines.append(f"cut off after its prose: {path.parents[1].name} KL {sum(kl) / len(kl):.4f}")
    return lines


def pack(out: Path) -> Path:
    """What a publication needs of every run, and the logs, as one small archive."""
    archive = out / "quality.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        for folder in sorted((out / "runs").glob("quality-*")):
            for name in PUBLISHED if (folder / PUBLISHED[0]).is_file() else (CUT_OFF,):
                if (folder / name).is_file():
                    tar.add(folder / name, f"{folder.name}/{name}")
        for log in sorted(out.glob("*.log")):
            tar.add(log, f"logs/{log.name}")
    return archive


def main(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    jobs = build_jobs(arguments, out)
    in_time = run_jobs(jobs, arguments.jobs, time.monotonic() + 60 * arguments.minutes)
    for job in jobs:
        if job.process is None or job.process.returncode != 0:
            lines = job.log.read_text(errors="replace").splitlines()[-6:] if job.log.exists() else ["never started"]
            _say("\n".join([f"--- {job.name}", *lines]))
    _say("\n".join([table(records(out / "runs")), *cut_off(out / "runs")]))
    _say(f"{pack(out)}")
    if not in_time:
        return OUT_OF_TIME
    return int(any(job.process is None or job.process.returncode for job in jobs))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, help="a file of conf/model, or NAME=FOLDER")
    parser.add_argument("--quants", nargs="+", required=True)
    parser.add_argument("--out", required=True, help="folder for runs, logs and the archive")
    parser.add_argument("--jobs", type=int, default=1, help="at a time")
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="a further word for every run.py")
    return parser.parse_args()


def command() -> None:
    """This module as a command: it exits, and tells a user who stopped it what became of the runs."""
    given = _arguments()
    try:
        with termination_raises():
            code = main(given)
    except UserError as error:
        sys.exit(f"kvtuner: {error}")
    except (KeyboardInterrupt, SystemExit) as stop:
        sys.stderr.write("kvtuner: stopped: every run it started is ended; the same command goes on with the others.\n")
        sys.exit(stop.code if isinstance(stop, SystemExit) else 130)
    sys.exit(code)


if __name__ == "__main__":
    command()
