"""A session of several runs that is stopped from outside."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.alone
SESSION = """
import sys
from pathlib import Path
from kvtuner_sglang.quality import session

session.PROJECT_ROOT = Path(sys.argv.pop(1))
session.command()
"""
# In the place of run.py: a run whose cleaning up takes until the test lets it end.
RUN = """
import os, signal, time
from pathlib import Path

def clean_up(*_):
    Path(f"{os.getpid()}.told").touch()
    while not Path("may_end").exists():
        time.sleep(0.05)
    Path(f"{os.getpid()}.ended").touch()
    os._exit(1)

signal.signal(signal.SIGTERM, clean_up)
Path(f"{os.getpid()}.started").touch()
time.sleep(600)
"""


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)])
def test_a_signal_ends_its_runs_whatever_follows_and_is_one_sentence(
    first: signal.Signals, second: signal.Signals, tmp_path: Path, hear_ctrl_c
) -> None:
    (tmp_path / "run.py").write_text(RUN)
    words = ["--out", str(tmp_path / "out"), "--model", "smollm2_135m", "--quants", "kv4", "bf16", "kv8", "--jobs", "2"]
    session = subprocess.Popen([sys.executable, "-c", SESSION, str(tmp_path), *words], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c)

    def runs(state: str) -> list[int]:
        return sorted(int(path.stem) for path in tmp_path.glob(f"*.{state}"))

    def wait_for_both(state: str) -> None:
        deadline = time.monotonic() + 60
        while len(runs(state)) < 2:
            assert session.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)

    try:
        wait_for_both("started")
        session.send_signal(first)
        wait_for_both("told")
        session.send_signal(second)
        with pytest.raises(subprocess.TimeoutExpired):
            session.wait(1)
        (tmp_path / "may_end").touch()
        told, said = session.communicate(timeout=60)
        assert runs("ended") == runs("started")
        assert not any(map(psutil.pid_exists, runs("started")))
        assert session.returncode == 128 + first
        assert told.splitlines() == [f"smollm2_135m-{quant} started" for quant in ("kv4", "bf16")]
        assert said.startswith("kvtuner: stopped: ")
        assert said.count("\n") == 1
    finally:
        session.kill()
        for pid in filter(psutil.pid_exists, runs("started")):
            os.kill(pid, signal.SIGKILL)
