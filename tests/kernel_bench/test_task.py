"""The task without a GPU: help, and one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvtuner_sglang.errors import RunFailed
from kvtuner_sglang.kernel_bench import contenders

ROOT = Path(__file__).parents[2]


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "run.py"), *words], capture_output=True, text=True, timeout=120,
                          cwd=cwd, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


def test_help_lists_the_options(tmp_path):
    done = run("task=kernels", "--help", cwd=tmp_path)
    assert done.returncode == 0
    for text in ("kernels: full, published, small", "memory_gib", "long_contexts", "peers: true"):
        assert text in done.stdout


def test_without_a_gpu_it_is_one_sentence_and_leaves_nothing(tmp_path):
    done = run("task=kernels", "runs_dir=runs", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.startswith("kvtuner: task=kernels times GPU kernels")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("word", "part"), [
    ("kernels.formats=[kv3]", "kernels.formats"), ("kernels.shapes=[gpt2]", "kernels.shapes"),
    ("kernels.shapes=[]", "kernels.shapes"), ("kernels.contexts=[64]", "kernels.contexts"),
    ("kernels.repeats=1", "kernels.repeats"), ("kernels=huge", "choose from full, published, small"),
])
def test_wrong_options_are_one_sentence(word, part, tmp_path):
    done = run("task=kernels", word, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("kvtuner: ")
    assert done.stderr.count("\n") == 1
    assert part in done.stderr


def test_a_peer_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(RunFailed, match=r"the peer flashinfer cannot run here.*kernels\.peers=false"):
        contenders.require_peers()
