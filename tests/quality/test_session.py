"""A session of several runs that is stopped from outside."""

import signal
import subprocess
import sys

import psutil


def test_sigterm_ends_its_runs_and_is_one_sentence(tmp_path):
    words = ["--out", str(tmp_path), "--model", "smollm2_135m", "--quants", "kv4", "bf16", "--jobs", "2"]
    session = subprocess.Popen([sys.executable, "-m", "kvtuner_sglang.quality.session", *words],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started = [session.stdout.readline() for _ in range(2)]
    runs = psutil.Process(session.pid).children(recursive=True)
    try:
        assert started == [f"smollm2_135m-{quant} started\n" for quant in ("kv4", "bf16")]
        session.send_signal(signal.SIGTERM)
        _, said = session.communicate(timeout=60)
        assert session.returncode == 143
        assert said.startswith("kvtuner: stopped: ")
        assert said.count("\n") == 1
        assert len(runs) >= 2
        assert not any(run.is_running() for run in runs)
    finally:
        for run in runs:
            if run.is_running():
                run.kill()
