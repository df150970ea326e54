"""W&B is a mirror: a real offline run stays inside the run directory, a broken or hanging W&B changes no result."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from kvtuner_sglang.evidence.record import RunRecord, load_record
from kvtuner_sglang.evidence.tracking import flat_metrics, mirror


def test_a_real_offline_run(written: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.chdir(home)
    run_dir = written()
    (run_dir / "report.md").write_text("# a report made by a test\n")
    before = load_record(run_dir)
    started = time.monotonic()
    tracking = mirror(run_dir)
    assert (tracking.status, tracking.reason) == ("ok", None)
    assert time.monotonic() - started < 10
    after = load_record(run_dir)
    assert after.tracking == tracking
    assert after.model_copy(update={"tracking": before.tracking}) == before
    [stored] = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    content = stored.read_bytes()
    assert b"config_hash" in content
    assert b"ttft_ms/prompt_tokens=1000/p50" in content
    assert list(home.iterdir()) == []
    assert {path.name for path in run_dir.iterdir()} == {"record.json", "report.md", "wandb", "wandb.log"}
    kept = [path for path in (run_dir / "wandb").rglob("*") if path.is_file()]
    assert any(b"made by a test" in path.read_bytes() for path in kept)


def test_a_broken_wandb_leaves_the_run_ok(written: Callable[..., Path], tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken" / "wandb"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text('raise ImportError("this W&B is broken")\n')
    monkeypatch.setenv("PYTHONPATH", f"{broken.parent}:{':'.join(path for path in sys.path if path)}")
    run_dir = written()
    tracking = mirror(run_dir)
    assert tracking.status == "failed"
    assert "this W&B is broken" in (tracking.reason or "")
    assert load_record(run_dir).status == "ok"
    assert load_record(run_dir).tracking == tracking


def test_a_hanging_wandb_is_ended_with_its_children(written: Callable[..., Path], tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = ("import os, pathlib, subprocess, sys, time; child = subprocess.Popen(['sleep', '600']); "
              f"pathlib.Path({str(pid_file)!r}).write_text(str(child.pid)); time.sleep(600)")
    run_dir = written()
    started = time.monotonic()
    tracking = mirror(run_dir, command=(sys.executable, "-c", script), timeout_s=2)
    assert time.monotonic() - started < 8
    assert tracking.status == "failed"
    assert tracking.reason == "W&B did not finish within 2 s; see wandb.log"
    pid = int(pid_file.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_disabled_starts_nothing(written: Callable[..., Path]) -> None:
    run_dir = written(mode="disabled")
    assert mirror(run_dir, command=("/does/not/exist",)).status == "disabled"
    assert {path.name for path in run_dir.iterdir()} == {"record.json"}


def test_metrics_are_flat_numbers(make_record: Callable[..., RunRecord]) -> None:
    flat = flat_metrics(make_record())
    assert flat["ttft_ms/prompt_tokens=10/p90"] == 15.0
    assert flat["kv/tokens"] == 1000
    json.dumps(flat)
    assert flat_metrics(make_record(status="failed")) == {}
