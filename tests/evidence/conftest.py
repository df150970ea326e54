"""A small record, made here and clearly of a test: no figure in it was measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtuner_sglang.evidence.record import (
    Environment,
    KVRecord,
    Metric,
    RankRecord,
    RunRecord,
    SamplesFile,
    Tracking,
    write_record,
)


def rank(number: int) -> RankRecord:
    return RankRecord(
        rank=number, tp_rank=number, pp_rank=0, node_rank=0, host="test-host", pid=100 + number, device="cpu",
        pool_class="PackedKVPool", layers=(0, 30), kv_heads=2, tokens=1000, pool_bytes=2_202_200, tail_bytes=0,
        bytes_per_token_formula=2200.0, bytes_per_token_allocated=2200.0, bytes_per_token_full=30720.0,
    )


def figures() -> dict[str, Any]:
    metric = Metric(unit="ms", n=5, mean=12.0, p50=11.0, p90=15.0, p99=15.9, min=10.0, max=16.0)
    rate = Metric(unit="tok/s", n=1, mean=33.25, p50=33.25, p90=33.25, p99=33.25, min=33.25, max=33.25)
    kv = KVRecord(
        format="K 4 bit; V 4 bit", enabled=True, plan_hash="0123456789ab", page_size=1, tokens=1000,
        effective_bits=4.5, budget_bytes_per_rank=2_202_200, full_precision_dtype="float32",
        full_precision_tokens=71, capacity_ratio=1000 / 71, package_version="0.1.0", sglang_version="0.5.17",
        ranks=(rank(0), rank(1)),
    )
    return {
        "metrics": {"ttft_ms/prompt_tokens=10": metric, "ttft_ms/prompt_tokens=1000": metric,
                    "output_tokens_per_s/concurrency=2": rate},
        "kv": kv, "rules": ("http_200: The server answered, and answered 200.",),
    }


@pytest.fixture
def make_record() -> Callable[..., RunRecord]:
    """make_record(status="ok", mode="offline", **changed fields)"""

    def make(status: str = "ok", mode: Any = "offline", **changed: Any) -> RunRecord:
        fields: dict[str, Any] = {
            "name": "serve-test-kv4", "status": status, "reason": None if status == "ok" else "rank 1 died",
            "config": {"task": "serve", "quant": {"name": "kv4"}, "dist": {"name": "tp2"},
                       "tracking": {"project": "kvtuner-sglang", "mode": mode}},
            "config_hash": "0123456789", "overrides": ("quant=kv4",), "commands": (),
            "environment": Environment(
                host="test-host", os="Linux", python="3.11.1", git_sha="a" * 40, git_dirty=False, lock_file="cpu.txt",
                lock_sha256="b" * 64, packages={"sglang": "0.5.17", "triton": None}, cpu="Test CPU", cpu_cores=2,
                ram_mib=1000, gpus=None, gpu_driver=None, gpu_clocks=None, gpu_topology=None, cuda=None,
                unknown=dict.fromkeys(("gpus", "gpu_driver", "gpu_clocks", "gpu_topology", "cuda"), "no GPU here"),
            ),
            "model": None, "kv": None, "metrics": {}, "memory": (), "rules": (), "warnings": (),
            "samples": SamplesFile(file="requests.jsonl", count=0, sha256="c" * 64),
            "started": "2026-01-02T03:04:05+00:00", "ended": "2026-01-02T03:05:05+00:00", "seed": 0,
            "tracking": Tracking(mode=mode, status="pending"),
        }
        if status == "ok":
            fields |= figures()
        fields |= changed
        reasons = {name: "not part of this test" for name in ("reason", "model", "kv") if fields[name] is None}
        return RunRecord(**{"unknown": reasons} | fields)

    return make


@pytest.fixture
def written(tmp_path: Path, make_record: Callable[..., RunRecord]) -> Callable[..., Path]:
    """written(**as make_record) -> a run directory under tmp_path/runs that holds the record."""

    def write(**changed: Any) -> Path:
        record = make_record(**changed)
        run_dir = tmp_path / "runs" / record.name
        run_dir.mkdir(parents=True)
        write_record(run_dir, record)
        return run_dir

    return write
