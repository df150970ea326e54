"""Runs tests/plugin in a process with a CPU server's environment, whose stand-ins must not reach other tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvtuner_sglang.cpu_engine.environment import cpu_server_environment

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU tests/plugin runs by itself")


@pytest.mark.parametrize("marks", ["not gpu and not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_plugin_inside_sglang(marks):
    environment = {**os.environ, **cpu_server_environment(tp_size=1, ranks_on_host=1, node_rank=0)}
    run("tests/plugin", marks, environment)


def test_the_fused_backend_inside_sglang_under_tritons_interpreter():
    environment = {**os.environ, **cpu_server_environment(tp_size=1, ranks_on_host=1, node_rank=0),
                   "TRITON_INTERPRET": "1"}
    run("tests/plugin/interpreted", "not gpu and not slow", environment)


def run(folder, marks, environment):
    command = [sys.executable, "-m", "pytest", "-q", "-m", marks, folder]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout
