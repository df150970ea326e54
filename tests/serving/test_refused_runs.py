"""`python run.py` that cannot start: one sentence, a non-zero exit, nothing left behind."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def refused(*overrides: str) -> str:
    """The one line that a refused run writes to stderr."""
    done = subprocess.run([sys.executable, "run.py", "tracking=disabled", *overrides], cwd=ROOT, capture_output=True,
                          text=True, timeout=60, check=False)
    assert done.returncode not in (0, None)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("kvtuner: ")
    assert line.endswith(".")
    return line


@pytest.fixture
def busy_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize("override", ["dist.http_ports=[{}]", "dist.dist_port={}"])
def test_a_port_in_use(tmp_path: Path, busy_port: int, override: str) -> None:
    # No probe, whose progress is on stderr, too, unless an earlier test left its result.
    line = refused(override.format(busy_port), "quality.probe=false", f"runs_dir={tmp_path / 'runs'}")
    assert f"port {busy_port} is in use" in line
    assert not list((tmp_path / "runs").rglob("*"))


def test_an_unwritable_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(f"runs_dir={tmp_path / 'file' / 'runs'}")


def test_two_nodes_with_one_rank(tmp_path: Path) -> None:
    line = refused("dist=tp2pp2", "dist.tp=1", "dist.pp=1", f"runs_dir={tmp_path / 'runs'}")
    assert "cannot be shared by 2 nodes" in line
    assert not (tmp_path / "runs").exists()


def test_a_group_that_does_not_divide_the_head(tmp_path: Path) -> None:
    line = refused("quant=kv4_token", "quant.group_size=48", f"runs_dir={tmp_path / 'runs'}")
    assert "(quant.group_size) does not divide head_dim 64" in line
    assert not (tmp_path / "runs").exists()


def test_a_plan_of_another_model(tmp_path: Path) -> None:
    line = refused("quant=plan", "plan.path=preset:llama_3_1_8b_kivi_3_25", f"runs_dir={tmp_path / 'runs'}")
    assert "the plan is for Llama-3.1-8B with layers 32 but the model served has layers 30" in line
    assert not (tmp_path / "runs").exists()


def test_a_plan_that_leaves_a_layer_out(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"layer_bits": {"0-28": 4}}')
    line = refused("quant=plan", f"plan.path={tmp_path / 'plan.json'}", f"runs_dir={tmp_path / 'runs'}")
    assert "plan.json: the plan says nothing of layer 29: list it, or give the plan a default" in line
    assert not (tmp_path / "runs").exists()


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    line = refused("model=local", f"model.path={tmp_path / 'nothing'}", f"runs_dir={tmp_path / 'runs'}")
    assert "nothing" in line
    assert not (tmp_path / "runs").exists()
