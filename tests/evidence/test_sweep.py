"""A sweep ends with one row per job, failed ones included, through Hydra itself."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from kvtuner_sglang.evidence.outcome import Outcome
from kvtuner_sglang.evidence.record import RunRecord
from kvtuner_sglang.evidence.sweep import COLUMNS, SweepJob, job_of, markdown_table, summary_table, table, write_summary

OF_LOADS = ("load", "retractions", "capacity (req/s)")
LOAD_METRICS = ("ttft_ms", "output_tokens_per_s", "goodput_per_s", "retractions")
APPLICATION = """
import sys
from pathlib import Path
import hydra
from kvtuner_sglang.evidence.outcome import Outcome
from kvtuner_sglang.evidence.sweep import current_sweep

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def job(cfg):
    assert current_sweep() is not None
    return Outcome(Path(cfg.runs_dir) / cfg.quant, "ok", cfg.quant == "kv4", None)

job()
"""
CONFIG = """
quant: kv4
runs_dir: runs
hydra:
  sweep: {dir: "${runs_dir}/sweeps/.hydra", subdir: .}
  output_subdir: null
  callbacks: {summary: {_target_: kvtuner_sglang.evidence.sweep.SweepCallback}}
"""


@pytest.fixture
def jobs(make_record: Callable[..., RunRecord]) -> list[SweepJob]:
    return [SweepJob("quant=kv4", make_record()), SweepJob("quant=kv8", make_record(), skipped=True),
            SweepJob("quant=kv2", make_record(status="failed")), SweepJob("quant=kv3", None, reason="no | such\nfile")]


def test_table_has_a_row_for_every_job(jobs: list[SweepJob]) -> None:
    rows = table(jobs).to_dict("records")
    assert [row["job"] for row in rows] == ["quant=kv4", "quant=kv8", "quant=kv2", "quant=kv3"]
    assert [row["status"] for row in rows] == ["ok", "ok (done before)", "failed", "failed"]
    first, _, failed, lost = rows
    assert (first["KV tokens"], first["effective bits"], first["bytes/token"]) == (1000, 4.5, 4400.0)
    assert (first["TTFT p50 (ms)"], first["output tok/s"]) == (11.0, 33.2)
    assert (failed["reason"], failed["KV tokens"], failed["TTFT p50 (ms)"]) == ("rank 1 died", None, None)
    assert lost["reason"] == "no | such\nfile"


@pytest.mark.parametrize("capacity", [True, False])
def test_a_load_is_shown_by_its_own_figures(make_record: Callable[..., RunRecord], capacity: bool) -> None:
    """Of a capacity at the highest rate that is not above it, else at the highest of all."""
    seed = make_record()
    of_rate = {0.5: 1.0, 2.0: 3.0, 10.0: 5.0}
    one = seed.metric("output_tokens_per_s", concurrency=2)
    metrics = {f"{name}/rate_per_s={rate}": one.model_copy(update={"mean": value, "p50": value})
               for rate, value in of_rate.items() for name in LOAD_METRICS}
    if capacity:
        metrics["capacity_per_s"] = one.model_copy(update={"mean": 2.5})
    rows = table([SweepJob("quant=kv4", seed.model_copy(update={"metrics": metrics})), SweepJob("x", None)])
    value = 3.0 if capacity else 5.0
    assert list(rows.columns) == [name for name in COLUMNS if capacity or name != "capacity (req/s)"]
    assert rows.iloc[0][["load", "TTFT p50 (ms)", "output tok/s", "retractions"]].tolist() == [
        f"rate_per_s={2.0 if capacity else 10.0}", value, value, value]
    assert not capacity or rows.iloc[0]["capacity (req/s)"] == 2.5


def test_markdown_keeps_one_line_per_job(jobs: list[SweepJob]) -> None:
    lines = summary_table(jobs).splitlines()
    assert len(lines) == 2 + len(jobs)
    assert lines[0].split("|")[1].strip() == "job"
    assert "no \\| such file" in lines[-1]
    assert len({len(line) for line in lines}) == 1


def test_summary_files(jobs: list[SweepJob], tmp_path: Path) -> None:
    path = write_summary(tmp_path / "sweeps" / "one", jobs)
    assert "rank 1 died" in path.read_text()
    assert list(pd.read_csv(path.with_suffix(".csv")).columns) == [name for name in COLUMNS if name not in OF_LOADS]


def test_a_job_without_a_record_is_a_failed_job(tmp_path: Path) -> None:
    job = job_of(Outcome(tmp_path, "failed", False, "tp=3 does not divide 9 heads"), "dist=tp3")
    assert (job.status, job.reason) == ("failed", "tp=3 does not divide 9 heads")
    assert "run it first" in (job_of(Outcome(tmp_path, "ok", False, None), "x").reason or "")
    assert job_of(Outcome(None, "ok", False, None), "task=probe").status == "ok"


def test_hydra_multirun_prints_its_own_jobs(tmp_path: Path, written: Callable[..., Path]) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text(CONFIG)
    (tmp_path / "app.py").write_text(APPLICATION)
    written().rename(tmp_path / "runs" / "kv4")
    words = [sys.executable, "app.py", "-m", "quant=kv4,kv8"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    lines = [line for line in done.stdout.splitlines() if line.startswith("| quant=")]
    assert "| ok (done before) |" in lines[0]
    assert "run it first" in lines[1]
    [summary] = (tmp_path / "runs" / "sweeps").glob("*/summary.md")
    assert str(summary.relative_to(tmp_path)) in done.stdout


def test_the_table_needs_no_engine() -> None:
    script = ("import sys, kvtuner_sglang.evidence.sweep; "
              "print(sorted({'torch', 'sglang', 'wandb', 'pandas'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_markdown_table_pads() -> None:
    assert markdown_table(("a", "bb"), [("ccc", "d")]) == "| a   | bb |\n|-----|----|\n| ccc | d  |"
