"""W&B is a mirror: a real offline run stays inside the run directory, a broken or hanging W&B changes no result."""

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import psutil
import pytest

import wandb_file
from kvtuner_sglang.evidence.metric_figure import families_of
from kvtuner_sglang.evidence.record import RunRecord, Tracking, load_record
from kvtuner_sglang.evidence.tracking import environment, mirror
from kvtuner_sglang.evidence.wandb_run import flat_metrics


def test_a_real_offline_run(written: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("MPLCONFIGDIR", mpl.get_configdir())  # the cache of fonts is matplotlib's own
    monkeypatch.chdir(home)
    run_dir = written(tracking=Tracking(mode="offline", status="pending", group="2026-01-02_03-04-05"))
    (run_dir / "report.md").write_text("# a report made by a test\n")
    (run_dir / "logs").mkdir()
    (run_dir / "logs" / "node0.log").write_text("ready\n")
    before = load_record(run_dir)
    tracking = mirror(run_dir)
    assert (tracking.status, tracking.reason) == ("ok", None)
    after = load_record(run_dir)
    assert after.tracking == tracking
    assert after.model_copy(update={"tracking": before.tracking}) == before
    [stored] = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    assert_holds_the_record(stored, before)
    assert list(home.iterdir()) == []
    assert {path.name for path in run_dir.iterdir()} == {"record.json", "report.md", "logs", "wandb", "wandb.log"}
    kept = [path for path in (run_dir / "wandb").rglob("*") if path.is_file()]
    assert any(b"made by a test" in path.read_bytes() for path in kept)


def assert_holds_the_record(stored: Path, record: RunRecord) -> None:
    """What W&B would upload has the record's configuration, metrics, tables, figure and folder."""
    by_kind: dict[str, list[Any]] = {}
    for message in wandb_file.messages(stored):
        kind = message.WhichOneof("record_type")
        by_kind.setdefault(kind, []).append(getattr(message, kind))
    [run, *_] = by_kind["run"]
    config = wandb_file.values(run.config.update)
    assert {name: config[name] for name in record.config} == record.config
    assert (config["config_hash"], config["git_sha"]) == (record.config_hash, record.environment.git_sha)
    assert (run.project, run.run_group, run.job_type) == ("kvtuner-sglang", "2026-01-02_03-04-05", "serve")
    summary: dict[str, Any] = {}
    for update in by_kind["summary"]:
        summary |= wandb_file.values(update.update)
    assert {name: summary[name] for name in flat_metrics(record)} == flat_metrics(record)
    assert (summary["status"], summary["metrics._type"], summary["kv_ranks.nrows"]) == ("ok", "table-file", 2)
    assert summary["metrics_figure._type"] == "image-file"
    [folder] = [artifact for artifact in by_kind["artifact"] if artifact.type == "run"]
    assert {entry.path for entry in folder.manifest.contents} == {"record.json", "report.md", "logs/node0.log"}


def test_a_server_that_cannot_be_reached_leaves_the_run_ok(written: Callable[..., Path],
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound and not listening: every connection is refused
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
        run_dir = written(mode="online")
        before = load_record(run_dir)
        tracking = mirror(run_dir, timeout_s=20)
    assert (tracking.mode, tracking.status) == ("online", "failed")
    assert "connection refused" in (tracking.reason or "")
    assert load_record(run_dir).model_copy(update={"tracking": before.tracking}) == before


def test_online_the_users_own_settings_name_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_CONFIG_DIR", "/the/users/own")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    online, offline = environment(tmp_path, "online"), environment(tmp_path, "offline")
    assert online["WANDB_CONFIG_DIR"] == "/the/users/own"
    assert online["WANDB_BASE_URL"] == "https://wandb.example.org"
    assert offline["WANDB_CONFIG_DIR"] == str(tmp_path / "wandb" / ".config")
    assert online["WANDB_CACHE_DIR"] == offline["WANDB_CACHE_DIR"] == str(tmp_path / "wandb" / ".cache")


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


@pytest.mark.alone
def test_a_hanging_wandb_is_ended_with_its_children(written: Callable[..., Path], tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = ("import os, pathlib, subprocess, sys, time; child = subprocess.Popen(['sleep', '600']); "
              f"pathlib.Path({str(pid_file)!r}).write_text(str(child.pid)); time.sleep(600)")
    run_dir = written()
    tracking = mirror(run_dir, command=(sys.executable, "-c", script), timeout_s=2)
    assert tracking.status == "failed"
    assert tracking.reason == "W&B did not finish within 2 s; see wandb.log"
    pid = int(pid_file.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_disabled_starts_nothing(written: Callable[..., Path]) -> None:
    run_dir = written(mode="disabled")
    assert mirror(run_dir, command=("/does/not/exist",)).status == "disabled"
    assert {path.name for path in run_dir.iterdir()} == {"record.json"}


def test_a_metric_family_is_drawn_by_its_first_label(make_record: Callable[..., RunRecord]) -> None:
    record = make_record()
    metric = record.metric("ttft_ms", prompt_tokens=10)
    cells = {f"decode_tok_s/batch={batch}/context={context}": metric for context in (2, 1) for batch in (16, 4)}
    families = families_of(record.model_copy(update={"metrics": {**record.metrics, **cells, "kv_tokens": metric,
                                                                    "nats/dist=tp2": metric}}))
    assert [level for level, _ in families["ttft_ms", "prompt_tokens"][""]] == [10, 1000]
    assert {name: [level for level, _ in levels] for name, levels in families["decode_tok_s", "batch"].items()} == {
        "context=1": [4, 16], "context=2": [4, 16]}
    assert {"kv_tokens", "nats"}.isdisjoint(quantity for quantity, _ in families)


def test_metrics_are_flat_numbers(make_record: Callable[..., RunRecord]) -> None:
    flat = flat_metrics(make_record())
    assert flat["ttft_ms/prompt_tokens=10/p90"] == 15.0
    assert flat["kv/tokens"] == 1000
    json.dumps(flat)
    assert flat_metrics(make_record(status="failed")) == {}
