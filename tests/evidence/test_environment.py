"""The environment names commit and lock, or says why it cannot."""

import hashlib
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from kvtuner_sglang.evidence.environment import collect_environment


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A git repository with one commit and both locks."""
    (tmp_path / "requirements").mkdir()
    for name in ("cpu.txt", "gpu.txt"):
        (tmp_path / "requirements" / name).write_text(f"torch  # {name}\n")
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "test"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    return tmp_path


def test_commit_lock_and_versions(project: Path) -> None:
    environment = collect_environment(project)
    sha = subprocess.run(["git", "-C", str(project), "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    assert environment.git_sha == sha.stdout.strip()
    assert environment.git_dirty is False
    assert environment.lock_file is not None
    lock = project / "requirements" / environment.lock_file
    assert environment.lock_sha256 == hashlib.sha256(lock.read_bytes()).hexdigest()
    assert environment.packages["wandb"] == metadata.version("wandb")
    assert environment.cpu_cores > 0
    assert environment.ram_mib > 0
    assert len(environment.load_average) == 3
    for result in ("runs/published/a.csv", "paper/main.typ"):
        (project / result).parent.mkdir(parents=True)
        (project / result).write_text("x")
    assert collect_environment(project).git_dirty is False
    (project / "new.txt").write_text("x")
    assert collect_environment(project).git_dirty is True


def test_what_is_unknown_has_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    environment = collect_environment(tmp_path)
    assert environment.git_sha is None
    assert environment.unknown["git_sha"] == "git is not installed here"
    assert environment.unknown["gpus"] == "nvidia-smi is not installed here"
    assert environment.unknown["lock_sha256"] == "no requirements/cpu.txt beside the installed package"
    assert "cores" in environment.machine


def test_outside_a_repository(tmp_path: Path) -> None:
    assert "failed" in collect_environment(tmp_path).unknown["git_sha"]


def test_a_gpu_as_nvidia_smi_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ncase "$*" in *=name*) echo "NVIDIA H100 80GB HBM3";; *driver*) echo 580.65;;\n'
                    '*clocks*) echo "1980 MHz, 2619 MHz, 700 W";; topo*) echo "GPU0 X";;\n'
                    '*) echo "| Driver Version: 580.65  CUDA Version: 13.0 |";; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    environment = collect_environment(tmp_path)
    assert environment.gpus == ("NVIDIA H100 80GB HBM3",)
    assert (environment.gpu_driver, environment.cuda, environment.gpu_topology) == ("580.65", "13.0", "GPU0 X")
    assert environment.machine.endswith("NVIDIA H100 80GB HBM3")
    assert environment.unknown["lock_file"] == "no requirements/gpu.txt beside the installed package"
