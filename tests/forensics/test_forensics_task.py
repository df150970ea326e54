"""task=forensics against two nodes that are not SGLang: what it keeps, what it calls nothing, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvtuner_sglang import command_line
from kvtuner_sglang.errors import ConfigError, UserError
from kvtuner_sglang.evidence.record import load_record
from kvtuner_sglang.evidence.samples import read_samples
from kvtuner_sglang.forensics.claimed import claimed
from kvtuner_sglang.forensics.publish import publish
from kvtuner_sglang.forensics.report import paragraph
from kvtuner_sglang.tasks import forensics
from lying_cluster import CONF, committed, run_task

EXP = ("exp=seed_report",)
TTFT_POSTS, LOADED_POSTS = 2 * 1, 3 + 4  # lengths x repeats, requests of both levels


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose node 1 answers 404 and whose node 0 is honest."""
    with pytest.MonkeyPatch.context() as patch:
        run_dir, record = run_task(forensics, tmp_path_factory.mktemp("forensics"), patch, *EXP,
                                   servers=("honest", "node1"))
    assert (record.status, record.reason) == ("ok", None)
    return committed(run_dir)


@pytest.mark.alone
def test_node_1s_replies_are_kept_as_what_they_are(done: Path) -> None:
    samples = read_samples(done)
    replies = [sample for sample in samples if sample["kind"] in ("node1_reply", "node1_loaded_reply")]
    assert len(replies) == TTFT_POSTS + LOADED_POSTS
    assert {(reply["http_status"], reply["body"]) for reply in replies} == {(404, '{"detail":"Not Found"}')}
    assert all(reply["success_to_the_script"] for reply in replies)
    [checked] = [sample for sample in samples if sample["kind"] == "node1_checked"]
    assert (checked["http_status"], checked["token_times_s"]) == (404, [])
    assert {sample["http_status"] for sample in samples if sample not in replies and sample != checked} == {200}


@pytest.mark.alone
def test_none_of_them_is_called_a_time_to_first_token(done: Path) -> None:
    record = load_record(done)
    replies = [s for s in read_samples(done) if s["kind"] == "node1_reply" and s["prompt_tokens"] == 1000]
    reply_ms = sorted((s["ended_s"] - s["sent_s"]) * 1000 for s in replies)
    metric = record.metric("node1_reply_ms", prompt_tokens=1000)
    assert (metric.n, metric.min, metric.max) == (1, pytest.approx(reply_ms[0]), pytest.approx(reply_ms[-1]))
    assert record.metric("node1_http_200_ratio", concurrency=2).mean == 0
    assert record.metric("node1_script_success_ratio", concurrency=2).mean == 1
    ttft = record.metric("ttft_ms", prompt_tokens=1000)
    assert ttft.min >= 90 > record.metric("ttft_floor_ms", prompt_tokens=1000).mean  # node 0 waits 90 ms
    assert not any("ttft" in key and metric.min < 90 for key, metric in record.metrics.items() if "floor" not in key)
    assert any(rule.startswith("node1_is_refused: ") for rule in record.rules)


@pytest.mark.alone
def test_report_figure_and_paragraph_are_those_of_the_record(done: Path) -> None:
    report = (done / "report.md").read_text()
    record = load_record(done)
    assert paragraph(record, claimed()) in report
    assert f"all {TTFT_POSTS + LOADED_POSTS} replies were HTTP 404" in report
    assert report.index("The seed report's figures") < report.index("Test results")
    assert "| 1000 tokens | 2.08, 1.89 to 2.23" in report
    assert (done / "forensics.png").stat().st_size > 10_000


@pytest.mark.alone
def test_what_is_published_is_made_of_the_run_alone(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "published"
    publish([done], folder)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert set(files) == {"README.md", "SHA256SUMS", "forensics.csv", "forensics.pdf", "forensics.png", "paragraph.md",
                          f"{done.name}/record.json", f"{done.name}/requests.jsonl"}
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    publish([folder / done.name], folder)
    assert {name: (folder / name).read_bytes() for name in files} == files
    assert b"claimed by the seed report" in files["forensics.csv"]


@pytest.mark.alone
@pytest.mark.parametrize(("servers", "rule"), [
    (("honest", "honest"), "node1_answers_404"), (("cached_prefix", "node1"), "cold_cache"),
    (("at_once", "node1"), "faster_than_floor")])
def test_a_run_that_shows_something_else_has_no_figures(servers: tuple[str, str], rule: str, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, record = run_task(forensics, tmp_path, monkeypatch, *EXP, servers=servers)
    assert (record.status, record.metrics) == ("invalid", {})
    assert rule in (record.reason or "")
    assert record.samples.count > 0
    assert not (run_dir / "forensics.csv").exists()
    with pytest.raises(UserError, match=f"invalid .*{rule}"):
        publish([committed(run_dir)], tmp_path / "published")
    assert not (tmp_path / "published").exists()


def test_the_option_chooses_the_seeds_topology_and_tests() -> None:
    config = command_line.load(EXP, CONF)
    assert (config.task, config.dist.name, config.workload.name) == ("forensics", "tp2pp2", "seed_report")
    assert [row.prompt_tokens for row in claimed().ttft] == list(config.workload.ttft.prompt_tokens)
    assert [row.concurrency for row in claimed().throughput] == list(config.workload.throughput.concurrency)
    with pytest.raises(ConfigError, match="second of two nodes"):
        command_line.load([*EXP, "dist=single"], CONF)


@pytest.mark.slow
def test_the_real_engines_second_node_answers_404(tmp_path: Path) -> None:
    short = ["workload.ttft.prompt_tokens=[10,1000]", "workload.ttft.repeats=2", "workload.throughput.requests=4",
             "workload.throughput.concurrency=[1,2]", "workload.throughput.prompt_tokens=16",
             "workload.throughput.output_tokens=4"]
    root = CONF.parent
    done = subprocess.run([sys.executable, str(root / "run.py"), *EXP, *short, f"runs_dir={tmp_path}",
                           "tracking=disabled"], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = tmp_path.glob("*/record.json")
    metrics = json.loads(path.read_text())["metrics"]
    assert metrics["node1_http_200_ratio/concurrency=1"]["max"] == 0
    assert metrics["node1_reply_ms/prompt_tokens=1000"]["max"] < metrics["ttft_floor_ms/prompt_tokens=1000"]["mean"]
    assert metrics["ttft_ms/prompt_tokens=1000"]["min"] > metrics["ttft_floor_ms/prompt_tokens=1000"]["mean"]
