"""The script behind make: when it builds, when it has nothing to do, what an interruption leaves, what it says."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = '[project]\nname = "small"\nversion = "1"\n[tool.setuptools]\npy-modules = ["small"]\n'


def script(root: Path) -> ModuleType:
    """requirements/setup_venv.py as it stands in a copy of the repository at `root`."""
    spec = importlib.util.spec_from_file_location("setup_venv", root / "requirements" / "setup_venv.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small(tmp_path: Path) -> ModuleType:
    """The script in a project of one module whose lock is three small packages and a stand-in for torch."""
    requirements = tmp_path / "requirements"
    requirements.mkdir()
    shutil.copy(ROOT / "requirements" / "setup_venv.py", requirements)
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "pyproject.toml").write_text('[project]\nname = "torch"\nversion = "1"\n')
    lock = [f"setuptools=={_locked('setuptools')}", "iniconfig==2.3.1", "six==1.17.0", "idna==3.20"]
    (requirements / "cpu.txt").write_text("\n".join(["# a lock", *lock, "torch==1"]) + "\n")
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    (tmp_path / "small.py").touch()
    return script(tmp_path)


def _locked(name: str) -> str:
    lines = (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{name}=="))


@pytest.fixture
def built(small: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """`small` after its .venv was really built, with torch from a folder instead of an index."""
    wheels = tmp_path / "wheels"
    making = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels]
    subprocess.run([*making, tmp_path / "torch"], check=True)
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    small.ensure(tmp_path / "requirements" / "cpu.txt")
    return small


def has(module: ModuleType, package: str) -> bool:
    python = module.VENV / "bin" / "python"
    return subprocess.run([python, "-c", f"import {package}"], capture_output=True).returncode == 0


def test_it_builds_then_has_nothing_to_do_then_sees_every_change(
    built: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "requirements" / "cpu.txt"
    assert all(has(built, package) for package in ("six", "idna", "iniconfig", "small"))

    marker = built.VENV / "untouched"
    marker.touch()
    built.ensure(lock)
    assert marker.exists()

    built.PYPROJECT.write_text(PYPROJECT.replace("1", "2"))
    built.ensure(lock)
    assert marker.exists(), "a changed pyproject.toml alone needs no new environment"
    assert built.read_stamp() == built.fingerprint(lock)

    rebuilt: list[Path] = []
    monkeypatch.setattr(built, "build", lambda lock, wanted: rebuilt.append(lock))
    lock.write_text(lock.read_text().replace("six==1.17.0\n", ""))
    built.ensure(lock)
    assert rebuilt == [lock]


def test_a_command_that_fails_ends_with_its_own_last_lines(small: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "setup.log"
    with pytest.raises(small.SetupError) as stopped:
        small.run_or_stop("Installing six", ["sh", "-c", "seq 20; echo no such version >&2; exit 1"], log)
    lines = str(stopped.value).splitlines()
    assert lines[-2:] == ["no such version", f"Installing six failed; the lines above say why, the whole log is {log}."]
    assert "5" not in lines


@pytest.mark.alone
def test_an_interruption_is_said_and_leaves_no_stamp(
    small: ModuleType, tmp_path: Path, hear_ctrl_c: Callable[[], None]
) -> None:
    setup = subprocess.Popen(
        [sys.executable, tmp_path / "requirements" / "setup_venv.py"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
        preexec_fn=hear_ctrl_c,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not small.VENV.is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(setup.pid, signal.SIGINT)  # as a terminal does
    _, said = setup.communicate(timeout=30)
    assert setup.returncode == 130
    assert said.splitlines()[-1] == "setup interrupted; the next call starts it again"
    assert small.read_stamp() == {}


def test_a_broken_stamp_does_not_count(small: ModuleType) -> None:
    small.VENV.mkdir()
    small.STAMP.write_text(json.dumps({"lock": "half"})[:-1])
    assert small.read_stamp() == {}


def test_another_python_is_refused_in_one_sentence(
    small: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["setup_venv.py"])
    monkeypatch.setattr(sys, "version", "3.13.0 (main)")
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    assert small.main() == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("This is Python 3.13.0, and SGLang's pins need 3.11 or 3.12: ")
    assert said.err.count("\n") == 1
    assert not small.VENV.exists()


@pytest.mark.parametrize(("answer", "lock"), [("echo GPU 0: H100", "gpu.txt"), ("echo No devices", "cpu.txt")])
def test_the_lock_goes_by_what_nvidia_smi_lists(
    small: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str, lock: str
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\n{answer}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert small.find_lock().name == lock


def test_the_work_is_split_without_loss(small: ModuleType) -> None:
    for name in ("cpu", "gpu"):
        lock = ROOT / "requirements" / f"{name}.txt"
        pins = [line for line in lock.read_text().splitlines() if "==" in line and not line.startswith("#")]
        tools, torch, groups = small.split(lock)
        assert sorted([*tools, torch, *(pin for group in groups for pin in group)]) == sorted(pins)
        assert len(groups) == small.WORKERS
