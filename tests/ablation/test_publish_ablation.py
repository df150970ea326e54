"""Records of an ablation -> one table a machine, with checksums; what does not belong together is refused."""

import csv
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtuner_sglang.ablation.publish import publish, tables
from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.environment import PROJECT_ROOT
from kvtuner_sglang.evidence.published import publish_main, write_sums
from kvtuner_sglang.paper.check import folder_problems
from serve_records import NO_GPU, metric, write_run

METRICS = ({"tpot_floor_ms": metric(1.25, "ms")}
           | {f"ttft_ms/prompt_tokens={n}": metric(10.0 * n, "ms") for n in (10, 100)}
           | {f"output_tokens_per_s/concurrency={n}": metric(5.0 * n, "tok/s") for n in (1, 2)})


@pytest.fixture
def run_dir(tmp_path: Path) -> Callable[..., Path]:
    """run_dir("quant=kv4", ..., status=..., **of the environment) -> the folder that such a run would leave."""
    return lambda *overrides, **changed: write_run(tmp_path / "runs", ["exp=ablation", *overrides], METRICS, **changed)


def test_a_row_a_test_and_no_host_name(run_dir: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "ablation"
    publish([run_dir("quant=kv4", "dist=pp2"), run_dir("quant=bf16", "dist=pp2", load_average=())], folder)
    with (folder / "test_cpu_2_cores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["machine", "model", "dist", "quant", "kv_tokens", "effective_bits", "kv_bytes_per_token",
                             "prompt_tokens", "concurrency", "ttft_p50_ms", "output_tok_s", "tpot_floor_ms",
                             "load_average", "commit", "run"]
    assert len(rows) == 2 * 4
    kv4 = {(row["prompt_tokens"], row["concurrency"]): row for row in rows if row["quant"] == "kv4"}
    ttft, throughput = kv4["100", "1"], kv4["32", "2"]
    assert (ttft["ttft_p50_ms"], ttft["output_tok_s"]) == ("1001", "")
    assert (throughput["ttft_p50_ms"], throughput["output_tok_s"]) == ("", "10")
    assert (ttft["kv_tokens"], ttft["kv_bytes_per_token"], ttft["effective_bits"]) == ("900", "201", "4.25")
    assert (ttft["dist"], ttft["commit"], ttft["load_average"]) == ("pp2", "a" * 12, "3.5")
    assert {row["tpot_floor_ms"] for row in rows} == {"1.25"}
    assert {row["load_average"] for row in rows if row["quant"] == "bf16"} == {""}
    assert "secret-host" not in (folder / "test_cpu_2_cores.csv").read_text()


def test_table_and_checksums_come_back_and_a_rerun_replaces(run_dir: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "ablation"
    run = run_dir("quant=kv4")
    publish([run], folder)
    assert tables(folder) == {"test_cpu_2_cores.csv": (folder / "test_cpu_2_cores.csv").read_text()}
    publish([run, run_dir("quant=kv8"), run_dir("quant=kv8", "dist=tp2")], folder)
    sums = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines())
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(sums) == files - {"SHA256SUMS"}
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for name, digest in sums.items())
    assert len(set(folder.glob("*/record.json"))) == 3


def test_another_machine_has_a_table_of_its_own(run_dir: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "ablation"
    known = {"gpus": ("Test GPU",), "unknown": dict.fromkeys(NO_GPU[1:], "none")}
    publish([run_dir("quant=kv4"), run_dir("quant=kv4", "workload.ttft.repeats=9", **known)], folder)
    assert {path.name for path in folder.glob("*.csv")} == {"test_cpu_2_cores.csv", "test_gpu.csv"}


def test_four_gpus_are_one_machine(run_dir: Callable[..., Path], tmp_path: Path) -> None:
    known = {"gpus": ("Test GPU",) * 4, "unknown": dict.fromkeys(NO_GPU[1:], "none")}
    publish([run_dir("quant=kv4", **known)], tmp_path / "ablation")
    rows = list(csv.DictReader((tmp_path / "ablation" / "4_x_test_gpu.csv").read_text().splitlines()))
    assert {row["machine"] for row in rows} == {"4 x Test GPU"}


def test_the_seeds_cell_is_reported_again_in_both_languages(run_dir: Callable[..., Path], tmp_path: Path) -> None:
    folder, load = tmp_path / "ablation", ("latency_ms", "requests_per_s", "tpot_ms")
    whole = METRICS | {f"{name}/concurrency={n}": metric(3.0 * n, "ms") for name in load for n in (1, 2)}
    seed, *others = (write_run(tmp_path / "runs", ["exp=ablation", *words], whole) for words in (
        ["quant=kv4", "dist=tp2pp2"], ["quant=bf16", "dist=tp2pp2"], ["quant=kv4"]))
    record = seed / "record.json"
    record.write_text(record.read_text().replace('"sglang"', f'"{PROJECT_ROOT}/sglang", "--model-path", "~/a b"'))
    publish([seed, *others], folder)
    assert {path.parent.name for path in folder.glob("*/report.*.md")} == {seed.name}
    english, chinese = ((folder / seed.name / f"report.{language}.md").read_text() for language in ("en", "zh"))
    assert tables(folder)[f"{seed.name}/report.en.md"] == english
    assert english.startswith("# KVTuner-SGLang distributed test report")
    assert chinese.startswith("# KVTuner-SGLang 分布式测试报告")
    assert "| kv4 (this run) |" in english
    assert "| bf16           |" in english
    assert "\n./sglang \\\n  --model-path ~/'a b'\n" in english  # as a shell takes it
    assert str(PROJECT_ROOT) not in english
    left = folder / others[0].name / "report.en.md"
    left.write_text("of a run that is not the seed's")
    write_sums(folder)
    assert [sentence for sentence in folder_problems(folder) if str(left) in sentence]


@pytest.mark.parametrize(("overrides", "changed", "part"), [
    (["quant=kv8"], {"status": "failed"}, "rank 1 died"),
    (["quant=kv8"], {"git_dirty": True}, "no commit describes"),
    (["quant=kv8", "workload.ttft.repeats=4"], {}, "another workload"),
    (["quant=kv8", "seed=1"], {}, "another seed"),
    (["quant=kv8", "server.device=cuda"], {}, "another server"),
    (["quant=kv4", "quant.asym=false"], {}, "are both kv4 on single"),
    (["quant=kv8", "task=quality"], {}, "a run of task=quality"),
])
def test_what_does_not_belong_in_the_table_is_refused(run_dir: Callable[..., Path], tmp_path: Path,
                                                      overrides: list[str], changed: dict[str, Any], part: str) -> None:
    publish([run_dir("quant=kv4")], tmp_path / "ablation")
    before = {path: path.read_bytes() for path in tmp_path.glob("ablation/**/*") if path.is_file()}
    with pytest.raises(UserError, match=part):
        publish([run_dir(*overrides, **changed)], tmp_path / "ablation")
    assert {path: path.read_bytes() for path in tmp_path.glob("ablation/**/*") if path.is_file()} == before


def test_a_device_that_was_found_is_the_one_that_was_named(run_dir: Callable[..., Path], tmp_path: Path) -> None:
    publish([run_dir("quant=kv4"), run_dir("quant=kv8", "server.device=cpu")], tmp_path / "ablation")
    gpu = dict.fromkeys(NO_GPU, "1") | {"gpus": ("Test GPU",), "unknown": {}}
    publish([run_dir("quant=kv2", **gpu), run_dir("quant=k4v2", "server.device=cuda", **gpu)], tmp_path / "gpu")


def test_help_is_no_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    publish_main("how it is used", ["--help"], publish)
    assert capsys.readouterr().out == "how it is used"
    with pytest.raises(SystemExit, match="how it is used"):
        publish_main("how it is used", ["runs/one"], publish)
