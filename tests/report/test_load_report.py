"""The report of a load: a table of latencies, one of rates with intervals, and other formats under the same load."""

import re
from collections.abc import Callable

import pytest

from kvtuner_sglang.evidence.record import RunRecord
from kvtuner_sglang.report.console import print_summary
from kvtuner_sglang.report.markdown import render

LOADS = ("closed", "open", "longctx", "multiturn", "capacity")
MakeRun = Callable[..., RunRecord]


def table(report: str, first_cell: str) -> list[list[str]]:
    """Header and body cells of the tables whose header begins with `first_cell`, one after another."""
    found = []
    for block in re.findall(rf"^\| {first_cell} .*?(?:\n\n|\Z)", report, re.MULTILINE | re.DOTALL):
        lines = block.strip().splitlines()
        found += [[cell.strip() for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]]
    return found


@pytest.mark.parametrize("name", LOADS)
def test_every_load_has_its_sections_and_no_gap(make_run: MakeRun, name: str) -> None:
    report = render(make_run("quant=kv4_token", f"workload={name}"))
    for heading in ("### 1. Under load", "### 2. Memory usage", "## Other formats under this load", "## Validity"):
        assert f"\n{heading}\n" in report
    assert not re.search(r"\{[a-z_]+[:}]", report)
    assert "None" not in report
    assert "Ablation" not in report


def test_latencies_are_of_requests_and_rates_of_repeats(make_run: MakeRun) -> None:
    """Ten requests in 1.0, 1.1 and 1.2 s: 10, 9.09 and 8.33 req/s, standard error 0.4818, t(0.975, 2) = 4.303."""
    [header, first, second, header_of_rates, one, _four] = table(
        render(make_run("quant=kv4_token", "workload=closed")), "Load")
    assert header[:5] == ["Load", "n", "ttft_ms p50", "ttft_ms p90", "ttft_ms p99"]
    assert first[:5] == ["concurrency=1", "30", "100.0", "100.0", "100.0"]
    assert second[0] == "concurrency=4"
    assert dict(zip(header_of_rates, one, strict=True))["requests_per_s"] == "9.141 (7.068 to 11.21)"
    assert dict(zip(header_of_rates, one, strict=True))["slo_share"] == "1"
    assert dict(zip(header_of_rates, one, strict=True))["retractions"].startswith("10 (")


def test_turns_are_shown_after_their_load(make_run: MakeRun) -> None:
    rows = table(render(make_run("quant=kv4_token", "workload=multiturn")), "Load")
    assert [row[0] for row in rows[1:9]] == [f"concurrency={n}{turn}" for n in (1, 2)
                                             for turn in ("", "/turn=1", "/turn=2", "/turn=3")]


def test_open_loops_say_how_late_they_were(make_run: MakeRun) -> None:
    report = render(make_run("quant=kv4_token", "workload=open"))
    assert "at most 2.5 ms (p99) after their schedule; 100 ms were allowed" in report
    assert "after their schedule" not in render(make_run("quant=kv4_token", "workload=closed"))


def test_formats_are_compared_under_the_same_load_alone(make_run: MakeRun) -> None:
    this = make_run("quant=kv4_token", "workload=capacity")
    other = make_run("quant=bf16", "workload=capacity")
    report = render(this, [other])
    assert "is **0.5667 (0.2798 to 0.8535) req/s**, the mean of 3 repeats" in report
    rows = table(report.partition("## Other formats")[2], "Configuration")
    assert [row[0] for row in rows[1:]] == ["kv4_token (this run)", "bf16"]
    kv4, bf16 = (dict(zip(rows[0], row, strict=True)) for row in rows[1:])
    assert int(kv4["KV tokens"]) > int(bf16["KV tokens"])
    assert kv4["Highest rate within the SLO (req/s)"] == "0.5667 (0.2798 to 0.8535)"
    assert (kv4["Load"], kv4["Status"]) == ("rate_per_s=0.5", "ok")  # not 2.0, the highest that was tried
    assert "different commits" not in report


def test_a_format_that_failed_is_shown_with_its_reason(make_run: MakeRun) -> None:
    this = make_run("quant=kv4_token", "workload=capacity")
    report = render(this, [make_run("quant=bf16", "workload=capacity", status="invalid", sha="b" * 40)])
    rows = table(report.partition("## Other formats")[2], "Configuration")
    assert rows[2][:3] == ["bf16", "invalid: rank 3 on node 1 died", ""]
    assert f"These runs are from different commits or had uncommitted changes (+): {'a' * 10}, {'b' * 10}." in report


def test_the_console_shows_every_load(make_run: MakeRun) -> None:
    run = make_run("quant=kv4_token", "workload=capacity", "workload.rates_per_s=[0.5,0.7,1,1.4,2]")
    lines = print_summary(run).splitlines()
    assert sum("TTFT p50    100.0 ms" in line for line in lines) == 5
    assert "  capacity    0.567 req/s within the SLO, mean of 3 repeats" in lines
