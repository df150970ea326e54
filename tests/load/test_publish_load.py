"""Records of loads -> one table a machine; runs of one workload that differ in more than their format are refused."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.record import Metric
from kvtuner_sglang.load.publish import publish, tables
from serve_records import metric, write_run


def level(where: str, value: float) -> dict[str, Metric]:
    """Metrics of a level; figures of requests and of repeats differ, so that a mix-up shows."""
    found = {f"{name}/{where}": metric(value, "ms", n=12, p99=value + 9) for name in ("ttft_ms", "tpot_ms", "itl_ms",
                                                                                     "e2e_ms")}
    rates = ("goodput_per_s", "slo_share", "cached_tokens", "retractions")
    found |= {f"{name}/{where}": metric(value / 2, "1/s", n=3) for name in rates}
    return found | {f"output_tokens_per_s/{where}": metric(value / 4, "tok/s", n=3, ci95=(value / 8, value))}


CAPACITY = {"capacity_per_s": metric(0.8, "req/s", n=3, ci95=(0.5, 1.1)),
            **level("rate_per_s=0.5", 100.0), **level("rate_per_s=1", 200.0)}
CAPACITY["output_tokens_per_s/rate_per_s=0.5"] = metric(25.0, "tok/s")  # one repeat alone tried it
TURNS = {**level("concurrency=2", 40.0),
         **{key: value for key, value in level("concurrency=2/turn=1", 60.0).items() if key.startswith(
             ("ttft", "tpot", "itl", "e2e", "cached"))}}


@pytest.fixture
def run_dir(tmp_path: Path) -> Callable[..., Path]:
    """run_dir(metrics, "quant=kv4", ...) -> the folder that such a run would leave."""
    return lambda metrics, *overrides, **changed: write_run(tmp_path / "runs", overrides, metrics, **changed)


def rows_in(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_a_level_and_a_row_a_turn(run_dir: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "load"
    publish([run_dir(CAPACITY, "exp=capacity", "quant=kv4_token"), run_dir(CAPACITY, "exp=capacity", "quant=bf16"),
             run_dir(TURNS, "workload=multiturn", "quant=kv4")], folder)
    assert tables(folder) == {"test_cpu_2_cores.csv": (folder / "test_cpu_2_cores.csv").read_text()}
    rows = rows_in(folder / "test_cpu_2_cores.csv")
    assert [(row["workload"], row["quant"], row["rate_per_s"], row["concurrency"], row["turn"]) for row in rows] == [
        ("capacity", "bf16", "0.5", "", ""), ("capacity", "bf16", "1", "", ""),
        ("capacity", "kv4_token", "0.5", "", ""), ("capacity", "kv4_token", "1", "", ""),
        ("multiturn", "kv4", "", "2", "1"), ("multiturn", "kv4", "", "2", "")]
    once, slow, turn = rows[0], rows[1], rows[4]
    assert (once["output_tok_s"], once["output_tok_s_low"], once["output_tok_s_high"], once["repeats"]) == (
        "25", "", "", "1")
    assert (slow["ttft_p50_ms"], slow["ttft_p99_ms"], slow["requests"], slow["repeats"]) == ("201", "209", "12", "3")
    assert (slow["output_tok_s"], slow["output_tok_s_low"], slow["output_tok_s_high"]) == ("50", "25", "200")
    assert (slow["capacity_per_s"], slow["capacity_low"], slow["capacity_high"]) == ("0.8", "0.5", "1.1")
    assert (slow["retractions"], slow["slo_share"], slow["kv_gib"]) == ("100", "100", "0.00575")
    assert (turn["ttft_p50_ms"], turn["output_tok_s"], turn["goodput_per_s"], turn["capacity_per_s"]) == (
        "61", "", "", "")


@pytest.mark.parametrize(("overrides", "part"), [
    (["quant=kv8_token", "workload.repeats=4"], "another workload"),
    (["quant=kv8_token", "server.kv_gib=0.01"], "another server"),
    (["quant=kv4_token", "quant.asym=false"], "are both kv4_token on single"),
    (["quant=kv8_token", "workload=smoke"], "is no load but workload=smoke"),
])
def test_what_does_not_belong_in_the_table_is_refused(run_dir: Callable[..., Path], tmp_path: Path,
                                                      overrides: list[str], part: str) -> None:
    folder = tmp_path / "load"
    publish([run_dir(CAPACITY, "exp=capacity", "quant=kv4_token")], folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=part):
        publish([run_dir(CAPACITY, "exp=capacity", *overrides)], folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
