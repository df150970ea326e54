"""Records of an ablation -> one table a machine, with checksums; what does not belong together is refused."""

import csv
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtuner_sglang import command_line
from kvtuner_sglang.ablation.publish import publish, published
from kvtuner_sglang.ablation.tidy import table_of, to_csv
from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.assemble import Figures, assemble
from kvtuner_sglang.evidence.record import Environment, KVRecord, Metric, RankRecord, write_record
from kvtuner_sglang.evidence.samples import SampleLog
from kvtuner_sglang.serving.client import Sample

CONF = Path(__file__).parents[2] / "conf"
NO_GPU = ("gpus", "gpu_driver", "gpu_clocks", "gpu_topology", "cuda")


def metric(value: float, unit: str) -> Metric:
    return Metric(unit=unit, n=1, mean=value, p50=value + 1, p90=value, p99=value, min=value, max=value)


def environment(**changed: Any) -> Environment:
    fields = {
        "host": "secret-host", "os": "Linux", "python": "3.11", "git_sha": "a" * 40, "git_dirty": False,
        "lock_file": "cpu.txt", "lock_sha256": "b" * 64, "packages": {}, "cpu": "Test CPU", "cpu_cores": 2,
        "ram_mib": 1, "load_average": (3.5, 2.0, 1.0), **dict.fromkeys(NO_GPU),
        "unknown": dict.fromkeys(NO_GPU, "none"),
    }
    return Environment(**{**fields, **changed})


def rank(number: int) -> RankRecord:
    return RankRecord(rank=number, tp_rank=0, pp_rank=number, node_rank=0, host="h", pid=1, device="cpu",
                      pool_class="PackedKVPool", layers=(0, 1), kv_heads=1, tokens=900, pool_bytes=1, tail_bytes=0,
                      bytes_per_token_formula=100.0, bytes_per_token_allocated=100.5, bytes_per_token_full=400.0)


@pytest.fixture
def run_dir(tmp_path: Path) -> Callable[..., Path]:
    """run_dir("quant=kv4", ..., status=..., **of the environment) -> the folder that such a run would leave."""

    def make(*overrides: str, status: Any = "ok", **changed: Any) -> Path:
        config = command_line.load(["exp=ablation", f"runs_dir={tmp_path / 'runs'}", *overrides], CONF)
        config.run_dir.mkdir(parents=True)
        with SampleLog(config.run_dir) as log:
            log.append(Sample("r", "ttft", 1, 1, 0.0, 0.0))
        kv = KVRecord(format="f", enabled=True, plan_hash="0", page_size=64, tokens=900, effective_bits=4.25,
                      budget_bytes_per_rank=1, full_precision_dtype="float32", full_precision_tokens=1,
                      capacity_ratio=900.0, package_version="0", sglang_version="0", ranks=(rank(0), rank(1)))
        metrics = {f"ttft_ms/prompt_tokens={n}": metric(10.0 * n, "ms") for n in (10, 100)}
        metrics |= {f"output_tokens_per_s/concurrency={n}": metric(5.0 * n, "tok/s") for n in (1, 2)}
        figures = Figures(metrics=metrics, rules=("a rule.",), kv=kv)
        write_record(config.run_dir, assemble(
            config, overrides=overrides, started="2026-01-02T03:04:05+00:00", status=status,
            reason=None if status == "ok" else "rank 1 died", environment=environment(**changed),
            samples=log.summary(), group=None, figures=figures if status == "ok" else None))
        return config.run_dir

    return make


def test_a_row_a_test_and_no_host_name(run_dir: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "ablation"
    publish([run_dir("quant=kv4", "dist=pp2"), run_dir("quant=bf16", "dist=pp2", load_average=())], folder)
    with (folder / "test_cpu_2_cores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["machine", "model", "dist", "quant", "kv_tokens", "effective_bits", "kv_bytes_per_token",
                             "prompt_tokens", "concurrency", "ttft_p50_ms", "output_tok_s", "load_average", "commit",
                             "run"]
    assert len(rows) == 2 * 4
    kv4 = {(row["prompt_tokens"], row["concurrency"]): row for row in rows if row["quant"] == "kv4"}
    ttft, throughput = kv4["100", "1"], kv4["32", "2"]
    assert (ttft["ttft_p50_ms"], ttft["output_tok_s"]) == ("1001", "")
    assert (throughput["ttft_p50_ms"], throughput["output_tok_s"]) == ("", "10")
    assert (ttft["kv_tokens"], ttft["kv_bytes_per_token"], ttft["effective_bits"]) == ("900", "201", "4.25")
    assert (ttft["dist"], ttft["commit"], ttft["load_average"]) == ("pp2", "a" * 12, "3.5")
    assert {row["load_average"] for row in rows if row["quant"] == "bf16"} == {""}
    assert "secret-host" not in (folder / "test_cpu_2_cores.csv").read_text()


def test_table_and_checksums_come_back_and_a_rerun_replaces(run_dir: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "ablation"
    run = run_dir("quant=kv4")
    publish([run], folder)
    assert to_csv(table_of(published(folder))) == (folder / "test_cpu_2_cores.csv").read_text()
    publish([run, run_dir("quant=kv8"), run_dir("quant=kv8", "dist=tp2")], folder)
    sums = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines())
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(sums) == files - {"SHA256SUMS"}
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for name, digest in sums.items())
    assert len(published(folder)) == 3


def test_another_machine_has_a_table_of_its_own(run_dir: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "ablation"
    known = {"gpus": ("Test GPU",), "unknown": dict.fromkeys(NO_GPU[1:], "none")}
    publish([run_dir("quant=kv4"), run_dir("quant=kv4", "workload.ttft.repeats=9", **known)], folder)
    assert {path.name for path in folder.glob("*.csv")} == {"test_cpu_2_cores.csv", "test_gpu.csv"}


@pytest.mark.parametrize(("overrides", "changed", "part"), [
    (["quant=kv8"], {"status": "failed"}, "rank 1 died"),
    (["quant=kv8"], {"git_dirty": True}, "no commit describes"),
    (["quant=kv8", "workload.ttft.repeats=4"], {}, "another workload"),
    (["quant=kv8", "seed=1"], {}, "another seed"),
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
