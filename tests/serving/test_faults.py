"""Faults in the middle of a real run: it ends as failed, soon, names the rank, publishes nothing, leaves no process."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.alone
ROOT = Path(__file__).parents[2]
LONG_RUN = ("quant=kv4", "workload=smoke", "workload.ttft.repeats=1000", "tracking=disabled")
MEASURING = "time to first token: round 1"
START_S = 300


@dataclass
class Run:
    """A `python run.py` in the middle of its measurement. pids: each rank's, and those of all its processes."""

    process: "subprocess.Popen[bytes]"
    output: Path
    run_dir: Path
    rank_pids: dict[int, int]
    all_pids: set[int]

    def said(self) -> str:
        return self.output.read_text()

    def children(self) -> set[int]:
        return {p.pid for p in psutil.Process(self.process.pid).children(recursive=True)}

    def wait(self, limit_s: float) -> float:
        """Seconds until it ended."""
        started = time.monotonic()
        self.process.wait(limit_s)
        return time.monotonic() - started


@pytest.fixture
def start_run(tmp_path: Path, hear_ctrl_c: Callable[[], None]):
    runs: list[Run] = []

    def start(dist: str, until: Callable[[Run], bool] = lambda run: MEASURING in run.said()) -> Run:
        output = tmp_path / "output"
        argv = [sys.executable, "run.py", f"dist={dist}", *LONG_RUN, f"runs_dir={tmp_path / 'runs'}"]
        with output.open("wb") as file:
            process = subprocess.Popen(argv, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, preexec_fn=hear_ctrl_c)
        run = Run(process, output, tmp_path, {}, set())
        runs.append(run)
        deadline = time.monotonic() + START_S
        while not until(run):
            assert process.poll() is None, run.said()
            assert time.monotonic() < deadline, run.said()
            time.sleep(0.2)
        run.all_pids = run.children()
        run.run_dir = next((tmp_path / "runs").glob("serve-*"))
        for path in (run.run_dir / "heartbeat").glob("rank*.json"):
            beat = json.loads(path.read_text())
            run.rank_pids[beat["rank"]] = beat["pid"]
        return run

    yield start
    for run in runs:
        for pid in run.all_pids | {run.process.pid}:
            if psutil.pid_exists(pid):
                psutil.Process(pid).kill()
        run.process.wait()


def alive(pids: set[int]) -> list[int]:
    return [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(("dist", "ranks", "number", "limit_s", "what"), [
    ("pp2", 2, signal.SIGKILL, 30, "died"),
    ("tp2", 2, signal.SIGSTOP, 90, "has been stopped"),
])
def test_a_lost_rank_ends_the_run(start_run, dist: str, ranks: int, number: signal.Signals, limit_s: float,
                                  what: str, record_property: Callable[[str, object], None]) -> None:
    run = start_run(dist)
    assert set(run.rank_pids) == set(range(ranks))
    assert set(run.rank_pids.values()) <= run.all_pids
    victim = run.rank_pids[ranks - 1]
    os.kill(victim, number)
    seconds = run.wait(limit_s)
    record_property("seconds_to_end", seconds)
    assert seconds < limit_s
    assert run.process.returncode == 1, run.said()
    assert alive(run.all_pids) == []
    record = json.loads((run.run_dir / "record.json").read_text())
    assert record["status"] == "failed"
    assert f"rank {ranks - 1} (node " in record["reason"]
    assert f"pid {victim}) {what}" in record["reason"]
    assert not record["metrics"]


def test_ctrl_c_while_it_starts_leaves_no_process_and_no_record(start_run) -> None:
    # node, rank, detokenizer, and multiprocessing's own tracker
    run = start_run("single", until=lambda run: len(run.children()) >= 4)
    run.process.send_signal(signal.SIGINT)
    assert run.wait(15) < 15
    assert run.process.returncode != 0
    assert alive(run.all_pids) == []
    assert not list(run.run_dir.glob("record.json"))
