"""Run folders as finished jobs of task=serve leave them, made without a server."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvtuner_sglang import command_line
from kvtuner_sglang.evidence.assemble import Figures, assemble
from kvtuner_sglang.evidence.record import Environment, KVRecord, Metric, NodeCommandRecord, RankRecord, write_record
from kvtuner_sglang.evidence.samples import SampleLog
from kvtuner_sglang.serving.client import Sample

CONF = Path(__file__).parents[1] / "conf"
NO_GPU = ("gpus", "gpu_driver", "gpu_clocks", "gpu_topology", "cuda")


def metric(value: float, unit: str, **changed: Any) -> Metric:
    fields = {"n": 1, "mean": value, "p50": value + 1, "p90": value, "p99": value, "min": value, "max": value}
    return Metric(unit=unit, **{**fields, **changed})


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


def write_run(runs_dir: Path, overrides: Sequence[str], metrics: Mapping[str, Metric], *, status: Any = "ok",
              **changed: Any) -> Path:
    """The folder of such a run, of two ranks; changed: fields of its environment."""
    config = command_line.load([*overrides, f"runs_dir={runs_dir}"], CONF)
    config.run_dir.mkdir(parents=True)
    commands = [NodeCommandRecord(node_rank=node, host="127.0.0.1", http_port=30000 + node, argv=("sglang",),
                                  environment={}) for node in range(config.dist.nnodes)]
    with SampleLog(config.run_dir) as log:
        log.append(Sample("r", "ttft", 1, 1, 0.0, 0.0))
    kv = KVRecord(format="f", enabled=True, plan_hash="0", page_size=64, tokens=900, effective_bits=4.25,
                  budget_bytes_per_rank=1, full_precision_dtype="float32", full_precision_tokens=1,
                  capacity_ratio=900.0, package_version="0", sglang_version="0", ranks=(rank(0), rank(1)))
    figures = Figures(metrics=dict(metrics), rules=("a rule.",), kv=kv)
    write_record(config.run_dir, assemble(
        config, overrides=overrides, started="2026-01-02T03:04:05+00:00", status=status,
        reason=None if status == "ok" else "rank 1 died", environment=environment(**changed),
        samples=log.summary(), group=None, commands=commands, figures=figures if status == "ok" else None))
    return config.run_dir
