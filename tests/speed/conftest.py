"""Made-up calls, specs and records of this folder's tests: no figure in them was measured."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvtuner_sglang.evidence.record import (
    Environment,
    KVRecord,
    ModelRecord,
    RankRecord,
    RunRecord,
    SamplesFile,
    Tracking,
    file_sha256,
    metric_key,
    write_record,
)
from kvtuner_sglang.measure.metrics import summarize
from kvtuner_sglang.speed.calls import Call, SpeedSpec


@pytest.fixture
def spec(tmp_path) -> SpeedSpec:
    return SpeedSpec(engine={"max_running_requests": 4, "dtype": "float32"}, enabled=True, device="cpu", page_size=64,
                     vocabulary=2048, seed=0, cells=[], new_tokens=(8, 24), warmups=1, repeats=2, ttft_repeats=2,
                     outputs_per_request=96, log_path=str(tmp_path / "engine.log"),
                     calls_path=str(tmp_path / "calls.jsonl"))


@pytest.fixture
def make_call() -> Callable[..., Call]:
    """make_call(**changes): a decode call of 4 x 128 tokens that counts."""
    good = Call(kind="timed", workload="decode", round=0, batch=4, context=128, cached=128, new_tokens=8, seconds=0.5,
                prompt_min=128, prompt_max=128, cached_min=64, cached_max=64, output_min=8, output_max=8, retractions=0,
                running=4, graph=False)
    return lambda **changes: replace(good, **changes)


def made_up_record(name: str, *, quant: str = "kv4", backend: str = "auto", device: str = "cuda:0",
                   status: Any = "ok", factor: float = 1.0, commit: str = "abcdef" * 7,
                   dirty: bool = False) -> RunRecord:
    metrics = {"kv_tokens": summarize([1000], "tokens")}
    for prefix, batch in (("", 4), ("", 48), ("saturation_", 90)):
        at = {"batch": batch, "context": 16384}
        metrics[metric_key(f"{prefix}decode_tok_s", **at)] = summarize([99.0 * factor, 100.0 * factor, 150.0], "tok/s")
        metrics[metric_key(f"{prefix}tpot_ms", **at)] = summarize([10.0], "ms")
    metrics[metric_key("ttft_ms", prompt_tokens=1000)] = summarize([30.0], "ms")
    metrics[metric_key("ttft_cached_ms", cached=16384, new=512)] = summarize([40.0], "ms")
    served = "flashinfer" if backend == "auto" else backend
    kv = KVRecord(
        format="K 4; V 4", enabled=quant.startswith("k"), plan_hash="0" * 12, page_size=64, tokens=1000,
        effective_bits=4.5, budget_bytes_per_rank=None, full_precision_dtype="bfloat16", full_precision_tokens=None,
        capacity_ratio=None, package_version="0", sglang_version="0", unknown=dict.fromkeys(
            ("budget_bytes_per_rank", "full_precision_tokens", "capacity_ratio"), "a test"),
        ranks=(RankRecord(rank=0, tp_rank=0, pp_rank=0, node_rank=0, host="h", pid=1, device=device, pool_class="P",
                          attention="fused" if quant.startswith("k") else served,
                          layers=(0, 1), kv_heads=1, tokens=1000, pool_bytes=1, tail_bytes=0, bytes_per_token_formula=1,
                          bytes_per_token_allocated=1, bytes_per_token_full=1),))
    found = {"metrics": metrics, "kv": kv, "rules": ("a rule",)} if status == "ok" else {
        "metrics": {}, "kv": None, "rules": ()}
    return RunRecord(
        name=name, status=status, reason=None if status == "ok" else "all_at_once: a test",
        config={"task": "speed", "model": {"name": "m"}, "dist": {"name": "single"}, "speed": {"backend": backend},
                "quant": {"name": quant, "enabled": quant.startswith("k")}},
        config_hash="0" * 10, overrides=(), commands=(), memory=(), warnings=(),
        unknown={"reason": "ok"} if status == "ok" else {"kv": "invalid"},
        environment=Environment(
            host="h", os="Linux", python="3", git_sha=commit, git_dirty=dirty, lock_file="f", lock_sha256="0",
            packages={}, cpu="Test CPU", cpu_cores=1, ram_mib=1, gpus=("Test GPU 80GB",), gpu_driver="1",
            gpu_clocks="1", gpu_topology="1", cuda="13"),
        model=ModelRecord(name="m", source="dummy:m", sha256="d" * 64, architecture="Qwen2ForCausalLM", layers=1,
                          q_heads=1, kv_heads=1, head_dim=64, parameters=1, dtype="bfloat16"),
        samples=SamplesFile(file="requests.jsonl", count=0, sha256="0"), started="2026-01-01T00:00:00+00:00",
        ended="2026-01-01T00:00:01+00:00", seed=0, tracking=Tracking(mode="disabled", status="disabled"), **found,
    )


@pytest.fixture
def run_dir(tmp_path) -> Callable[..., Path]:
    """run_dir(name, **as made_up_record): a run's folder under tmp_path/runs, its samples and their checksum."""

    def write(name: str, **changes: Any) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        samples = folder / "requests.jsonl"
        samples.write_text('{"kind": "timed"}\n')
        record = made_up_record(name, **changes)
        whole = SamplesFile(file=samples.name, count=1, sha256=file_sha256(samples))
        write_record(folder, record.model_copy(update={"samples": whole}))
        return folder

    return write
