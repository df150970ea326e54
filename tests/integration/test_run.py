"""`python run.py` as a user calls it: the seed's topology for real, its record, its report, and a sweep's table."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from kvtuner_sglang.report.language import TEXTS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
SHORT = [
    "workload.ttft.prompt_tokens=[10,50]",
    "workload.ttft.repeats=2",
    "workload.throughput.concurrency=[2]",
    "workload.throughput.requests=4",
    "workload.throughput.prompt_tokens=16",
    "workload.throughput.output_tokens=4",
]


def run(*words: str, timeout_s: int = 400, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *words],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env={**os.environ, **environment},
    )


def servers_of(runs: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if str(runs) in " ".join(p.info["cmdline"] or [])]


@pytest.fixture(scope="module")
def tp2pp2(tmp_path_factory):
    """One run of the README's second command, with a shorter workload."""
    runs = tmp_path_factory.mktemp("runs")
    done = run("quant=kv4", "dist=tp2pp2", f"runs_dir={runs}", *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    (run_dir,) = (path for path in runs.iterdir() if path.is_dir())
    return run_dir


def test_four_ranks_in_two_nodes_answer_every_request(tp2pp2):
    record = json.loads((tp2pp2 / "record.json").read_text())
    assert record["status"] == "ok"
    ranks = record["kv"]["ranks"]
    assert [rank["pool_class"] for rank in ranks] == ["PackedKVPool"] * 4
    assert sorted({rank["node_rank"] for rank in ranks}) == [0, 1]
    assert len({rank["pid"] for rank in ranks}) == 4
    requests = [json.loads(line) for line in (tp2pp2 / "requests.jsonl").read_text().splitlines()]
    assert len(requests) == record["samples"]["count"]
    for request in requests:
        assert request["http_status"] == 200
        assert request["output_tokens"] == request["output_tokens_asked"]


def test_the_report_has_the_seeds_sections_and_the_nodes_commands(tp2pp2):
    report = (tp2pp2 / "report.md").read_text()
    for section in (
        "Test configuration",
        "Time To First Token",
        "Throughput",
        "Memory",
        "architecture",
        "Key configuration",
        "Ablation",
    ):
        assert section in report
    for flag in ("--tp-size 2", "--pp-size 2", "--nnodes 2", "--node-rank 1", "--enable-kvtuner-quant"):
        assert flag in report
    assert (tp2pp2 / "commands" / "node1.sh").exists()


def test_wandb_holds_the_run(tp2pp2):
    record = json.loads((tp2pp2 / "record.json").read_text())
    assert record["tracking"]["status"] == "ok"
    assert list(tp2pp2.glob("wandb/**/run-*.wandb"))


def test_no_process_is_left(tp2pp2):
    assert servers_of(tp2pp2) == []


def test_a_finished_run_is_skipped(tp2pp2):
    before = (tp2pp2 / "record.json").read_bytes()
    done = run("quant=kv4", "dist=tp2pp2", f"runs_dir={tp2pp2.parent}", *SHORT, timeout_s=20)
    assert done.returncode == 0
    assert "skipped" in done.stdout
    assert (tp2pp2 / "record.json").read_bytes() == before


def test_a_finished_run_has_its_report_in_another_language_without_another_measurement(tp2pp2):
    before, english = (tp2pp2 / "record.json").read_bytes(), (tp2pp2 / "report.md").read_text()
    asked = ("quant=kv4", "dist=tp2pp2", f"runs_dir={tp2pp2.parent}", *SHORT)
    assert run(*asked, "report.language=zh", timeout_s=20).returncode == 0
    assert TEXTS["zh"]["memory"] in (tp2pp2 / "report.md").read_text()
    assert run(*asked, timeout_s=20).returncode == 0
    assert (tp2pp2 / "report.md").read_text() == english
    assert (tp2pp2 / "record.json").read_bytes() == before


def test_a_sweep_names_the_job_that_failed(tmp_path):
    """One good job and one whose byte budget holds no page: both are in the table and the exit is not 0."""
    words = ["-m", "quant=kv4", "server.kv_gib=0.75,0.000001", f"runs_dir={tmp_path}", "tracking=disabled", *SHORT]
    done = run(*words)
    assert done.returncode == 1
    table = done.stdout[done.stdout.rindex("| job") :]
    assert re.search(r"0\.75.*\| ok", table)
    assert re.search(r"0\.000001|1e-06.*\| failed", table)
    (summary,) = tmp_path.glob("sweeps/*/summary.md")
    assert "failed" in summary.read_text()
    assert servers_of(tmp_path) == []


def test_a_broken_wandb_is_named_in_a_record_that_is_ok(tmp_path):
    broken = tmp_path / "broken" / "wandb"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text('raise ImportError("this W&B is broken")\n')
    done = run("quant=kv4", f"runs_dir={tmp_path / 'runs'}", *SHORT, PYTHONPATH=str(broken.parent))
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = (json.loads(path.read_text()) for path in tmp_path.glob("runs/*/record.json"))
    assert record["status"] == "ok"
    assert record["tracking"]["status"] == "failed"
    assert "this W&B is broken" in record["tracking"]["reason"]
