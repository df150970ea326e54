"""The tests of tests/kernels/device on the CPU: small shapes under Triton's interpreter, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path


def test_the_kernels_pass_their_tests_under_the_interpreter():
    folder = Path(__file__).parent / "device"
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", str(folder)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
