"""The report has every section of the seed's, each figure in it is the record's, and a failed run has none."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtuner_sglang.evidence.record import Metric, RunRecord, write_record
from kvtuner_sglang.report import text_en
from kvtuner_sglang.report.console import print_summary
from kvtuner_sglang.report.language import TEXTS
from kvtuner_sglang.report.markdown import render, shell_command, write_report

TP2PP2 = ("quant=kv4_token", "dist=tp2pp2", "workload=seed_report")
HEADINGS = [
    "# KVTuner-SGLang distributed test report (2026-01-02)", "## Test configuration", "## Test results",
    "### 1. Time To First Token (TTFT)", "### 2. Throughput", "### 3. Memory usage", "### Warnings",
    "## Distributed architecture", "## Key configuration", "## Ablation so far", "## Validity", "## How to reproduce",
]


@pytest.fixture(scope="module")
def record(make_run: Callable[..., RunRecord]) -> RunRecord:
    return make_run(*TP2PP2)


@pytest.fixture(scope="module")
def report(record: RunRecord) -> str:
    return render(record)


def section(report: str, title: str) -> str:
    return re.split(r"^#+ ", report.split(f"{title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """The body cells of the first Markdown table in `text`."""
    lines = text[text.index("|") :].split("\n\n", 1)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_headings_in_the_seeds_order(report: str) -> None:
    outside_code = re.sub(r"```.*?```", "", report, flags=re.DOTALL)
    assert re.findall(r"^#+ .*$", outside_code, re.MULTILINE) == HEADINGS


def test_no_phrase_is_left_unfilled(report: str) -> None:
    assert not re.search(r"\{[a-z_]+[:}]", report)
    assert "None" not in report


def test_ttft_table_and_analysis(report: str) -> None:
    text = section(report, "### 1. Time To First Token (TTFT)")
    assert [row[0] for row in rows(text)] == ["10 tokens", "50 tokens", "100 tokens", "500 tokens", "1000 tokens"]
    assert rows(text)[-1] == ["1000 tokens", "530.40", "468.00", "650.00", "520.00", "624.00", "5"]
    assert "grows from 25.0 ms at 10 tokens (n=5) to 520.0 ms at 1000 tokens (n=5), a factor of 20.80" in text


def test_the_analysis_follows_the_data(record: RunRecord) -> None:
    """With the seed's own medians the sentence says that it stays level or falls: nothing in it is fixed."""
    first = record.metric("ttft_ms", prompt_tokens=10)
    for factor, words in ((0.8, "falls from"), (1.05, "stays level, from")):
        last = first.model_copy(update={"p50": first.p50 * factor})
        changed = record.model_copy(update={"metrics": {**record.metrics, "ttft_ms/prompt_tokens=1000": last}})
        assert f"median TTFT {words} 25.0 ms" in render(changed)


def test_throughput_table_and_analysis(report: str) -> None:
    text = section(report, "### 2. Throughput")
    assert [row[0] for row in rows(text)] == ["1", "2", "4", "8"]
    assert rows(text)[2] == ["4", "3.06", "49.0", "1224.0", "1200.0", "1440.0", "70.0", "100%", "16"]
    assert "at concurrency 8" in text
    assert "All 64 requests succeeded" in text
    assert "The success rate is no measurement" in text


def test_memory_says_what_counts(report: str, record: RunRecord) -> None:
    text = section(report, "### 3. Memory usage")
    assert "proves nothing" in text
    assert rows(text)[0][:5] == ["rank 0 (pid 4000)", "0", "900", "8000", "11.2%"]
    assert "| 0-14" in text
    assert "| 15-29" in text
    assert record.kv is not None
    assert f"holds {record.kv.tokens} tokens" in text
    assert "would hold 11650 by formula, so this is 7.11 times" in text
    assert "16 bits an element" in text
    assert "the factor is 3.56" in text


PLAN = """model: {architecture: LlamaForCausalLM, layers: 30, kv_heads: 3, head_dim: 64}
default: {nbits_key: 4, nbits_value: 4, axis_key: 0}
layers: {0-9: {nbits_key: 8, nbits_value: 8, axis_key: 0}}
"""


def test_a_mixed_plan_shows_bytes_by_rank_and_who_sets_the_capacity(make_run: Callable[..., RunRecord],
                                                                    tmp_path: Path) -> None:
    (tmp_path / "mixed.yaml").write_text(PLAN)
    record = make_run("quant=plan", f"plan.path={tmp_path / 'mixed.yaml'}", "dist=pp2")
    text = section(render(record), "### 3. Memory usage")
    table = rows(text.split("proves nothing", 1)[1])
    bytes_a_token = [3 * 2 * (10 * (64 + 4) + 5 * (32 + 4)), 3 * 2 * 15 * (32 + 4)]
    room = [2**28 // n for n in bytes_a_token]
    assert [row[4] for row in table] == [f"{n:.1f}" for n in bytes_a_token]
    assert [row[-2] for row in table] == [str(n) for n in room]
    assert (f"rank 0 (layers 0-14, {bytes_a_token[0]:.1f} bytes) has room for {room[0]}, the fewest, which all offer; "
            f"another would have room for {room[1]}") in text
    assert "| plan_mixed: layers 0-9: K 8 bit per token" in render(record)


def test_one_host_is_said(report: str, make_run: Callable[..., RunRecord]) -> None:
    text = section(report, "## Distributed architecture")
    assert "All 2 nodes ran on one host (test-host)" in text
    assert "loopback interface" in text
    assert "one host" not in render(make_run("quant=kv4"))


def test_diagram_is_of_the_ranks_that_ran(report: str) -> None:
    [drawing] = re.findall(r"```\n(.*?)\n```", section(report, "## Distributed architecture"), re.DOTALL)
    lines = drawing.splitlines()
    assert len({len(line) for line in lines}) == 1
    for word in ("Node 0 (Master)", "Node 1 (Worker)", "127.0.0.1:30001", "pid 4003", "PP0 TP1", "PP1 TP0",
                 "layers 0-14", "layers 15-29", "gloo across nodes"):
        assert word in drawing
    heads = next(line for line in lines if "Rank 0" in line)
    assert all(f"Rank {rank}" in heads for rank in range(4))


@pytest.mark.parametrize(("dist", "link"), [("single", "one process"), ("tp2", "gloo between ranks"),
                                            ("pp2", "gloo between ranks")])
def test_diagram_of_other_shapes(make_run: Callable[..., RunRecord], dist: str, link: str) -> None:
    [drawing] = re.findall(r"```\n(.*?)\n```", section(render(make_run(f"dist={dist}")), "## Distributed architecture"),
                           re.DOTALL)
    assert len({len(line) for line in drawing.splitlines()}) == 1
    assert link in drawing


def test_commands_are_ready_to_paste(report: str, record: RunRecord) -> None:
    command = shell_command(record.commands[1])
    assert command in report
    assert command.splitlines()[:3] == ["GLOO_SOCKET_IFNAME=lo \\", "python -m sglang.launch_server \\",
                                        "  --model-path '/models/a b' \\"]
    assert "  --node-rank 1 \\\n" in command
    assert "python run.py quant=kv4_token dist=tp2pp2 workload=seed_report force=true" in report


def test_ablation_lists_siblings_and_what_is_missing(make_run: Callable[..., RunRecord], tmp_path: Path) -> None:
    this = make_run(*TP2PP2)
    runs = [this, make_run("quant=bf16", *TP2PP2[1:]), make_run("quant=kv8", *TP2PP2[1:], status="failed"),
            make_run("quant=kv2", *TP2PP2[1:], host="another-machine"),  # not comparable
            make_run("quant=kv2", "dist=single", "workload=seed_report")]  # not comparable
    for run in runs:
        (tmp_path / f"{run.name}-{run.environment.host}").mkdir()
        write_record(tmp_path / f"{run.name}-{run.environment.host}", run)
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "record.json").write_text("{}")
    text = write_report(tmp_path / f"{this.name}-test-host").read_text()
    table = {row[0]: row for row in rows(section(text, "## Ablation so far"))}
    assert list(table) == ["bf16", "kv8", "kv4", "kv2", "kv4_token (this run)"]
    assert table["bf16"][2:5] == ["ok", "11650", "1.00"]
    assert table["kv8"][2] == "failed: rank 3 on node 1 died"
    assert table["kv2"][2] == "not run: `python run.py dist=tp2pp2 workload=seed_report quant=kv2`"
    assert table["kv4_token (this run)"][1] == "`--enable-kvtuner-quant --kvtuner-nbits-key 4`"
    assert "different commits" not in text


def test_times_of_another_machine_are_marked_in_the_ablation(make_run: Callable[..., RunRecord]) -> None:
    def on(floor_ms: float, quant: str) -> RunRecord:
        run = make_run(f"quant={quant}", *TP2PP2[1:])
        floor = Metric(unit="ms", n=1, **dict.fromkeys(("mean", "p50", "p90", "p99", "min", "max"), floor_ms))
        return run.model_copy(update={"metrics": run.metrics | {"tpot_floor_ms": floor}})

    failed = make_run("quant=kv2", *TP2PP2[1:], status="failed")
    text = render(on(1.5, "kv4"), [on(1.5, "bf16"), on(1.6, "kv8"), failed])
    table = {row[0]: row for row in rows(section(text, "## Ablation so far"))}
    assert {name: (row[6].endswith("†"), row[7].endswith("†"), "†" in row[3]) for name, row in table.items()
            if row[2] == "ok"} == {"bf16": (False, False, False), "kv8": (True, True, False),
                                   "kv4 (this run)": (False, False, False)}
    assert "† On another machine of the kind" in text
    unknown = make_run("quant=kv8", *TP2PP2[1:])
    assert "another machine of the kind" not in render(on(1.5, "kv4"), [on(1.5, "bf16"), unknown, failed])


def test_the_ablation_names_the_flag_of_sglangs_own_cache(make_run: Callable[..., RunRecord]) -> None:
    text = render(make_run("quant=kv4", *TP2PP2[1:]), [make_run("quant=fp8", *TP2PP2[1:])])
    table = {row[0]: row for row in rows(section(text, "## Ablation so far"))}
    assert table["fp8"][1] == "`--kv-cache-dtype fp8_e4m3`"


def test_ablation_over_two_commits_says_so(make_run: Callable[..., RunRecord]) -> None:
    text = render(make_run("quant=kv4"), [make_run("quant=kv8", sha="b" * 40)])
    assert "different commits or had uncommitted changes (+): aaaaaaaaaa, bbbbbbbbbb." in text


@pytest.mark.parametrize("status", ["failed", "invalid", "oom"])
def test_a_run_that_is_not_ok_has_a_reason_and_no_figure(make_run: Callable[..., RunRecord], status: str) -> None:
    failed = make_run(*TP2PP2, status=status)
    text = render(failed)
    assert f"This run is **{status}** and publishes no figures. Reason: rank 3 on node 1 died" in text
    for title in HEADINGS[2:8] + HEADINGS[9:11]:
        assert title not in text
    assert not re.search(r"\d (ms|tok/s|req/s|MiB)", text)
    assert "--node-rank 1" in text
    assert print_summary(failed) == f"{failed.name}: {status}\n  rank 3 on node 1 died"


def test_console_summary(record: RunRecord) -> None:
    lines = print_summary(record).splitlines()
    assert lines[0] == f"{record.name}: ok"
    assert "7.11 times float32" in lines[1]
    assert sum(line.strip().startswith("TTFT") for line in lines) == 5
    assert sum("at once" in line for line in lines) == 4
    assert lines[-1].strip() == "warning     something odd."


def test_every_phrase_is_used() -> None:
    folder = Path(text_en.__file__).parent
    sources = "".join(path.read_text() for path in folder.glob("*.py") if not path.name.startswith("text_"))
    used = set(re.findall(r"""["']([a-z_0-9]+)["']""", sources))
    assert text_en.TEXT.keys() - used == set()


def test_sglangs_own_cache_is_not_called_the_models_precision(make_run) -> None:
    report = render(make_run("quant=fp8"))
    assert "SGLang's own cache of 8 bits (fp8_e4m3)" in report
    assert "none, the model's own precision" not in report
    assert "8.00 effective bits" in report


def test_a_report_in_another_language_leaves_the_record_as_it_is(record: RunRecord, tmp_path: Path) -> None:
    run_dir = tmp_path / record.name
    run_dir.mkdir()
    before = write_record(run_dir, record).read_bytes()
    assert TEXTS["zh"]["memory"] in write_report(run_dir, language="zh").read_text()
    assert write_report(run_dir).read_text() == render(record)
    assert (run_dir / "record.json").read_bytes() == before
