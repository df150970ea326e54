"""KV bytes from a server's state in the shape the plugin writes; device memory of real processes."""

import os
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from kvtuner_sglang.config import RunConfig, parse
from kvtuner_sglang.measure.memory import device_memory, kv_record, parse_nvidia_smi
from kvtuner_sglang.quant import KVShape, describe_plan, format_hash

CONF = Path(__file__).parents[2] / "conf"


def config_of(quant: str) -> RunConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return parse(OmegaConf.to_container(compose("config", [f"quant={quant}"]), resolve=True))


def state_of(config: RunConfig, tokens: int, dtype: str = "float32", kv_gib: float | None = 0.25) -> dict[str, Any]:
    """Two pipeline stages of 15 layers with 3 kv heads of 64, as SmolLM2 has them, page size 1."""
    itemsize = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}[dtype]
    plan = config.quant.plan(15)
    bytes_per_token = KVShape(3, 64, itemsize, 1).bytes_per_token(plan)
    ranks = [
        {"rank": rank, "tp_rank": 0, "pp_rank": rank, "node_rank": rank, "pid": os.getpid(),
         "host": socket.gethostname(), "device": "cpu", "attention": "reference", "pool_class": "PackedKVPool",
         "layers": [15 * rank, 15 * rank + 15], "kv_heads": 3, "head_dim": 64, "dtype": dtype, "page_size": 1,
         "tokens": tokens, "pool_bytes": int((tokens + 1) * bytes_per_token), "tail_bytes": 0}
        for rank in range(2)
    ]
    return {"format": describe_plan(plan), "enabled": config.quant.enabled,
            "plan_hash": format_hash(plan), "page_size": 1, "kv_gib": kv_gib, "max_total_num_tokens": tokens,
            "effective_bits": 4.5, "package_version": "0.1.0", "sglang_version": "0.5.17", "ranks": ranks}


def test_kv4_per_token_by_hand() -> None:
    """Per token: 15 layers x 3 heads x (K and V) x (64 x 4 bit + fp16 scale and zero) = 3240 bytes; fp32 23040."""
    kv = kv_record(state_of(config_of("kv4_token"), 80_000), config_of("kv4_token"))
    first = kv.ranks[0]
    assert first.layers == (0, 15)
    assert first.bytes_per_token_formula == 15 * 3 * 2 * (32 + 4) == 3240
    assert first.bytes_per_token_allocated == pytest.approx(3240)
    assert first.bytes_per_token_full == 15 * 3 * 2 * 64 * 4
    assert kv.budget_bytes_per_rank == 2**28
    assert kv.full_precision_tokens == 2**28 // 23040
    assert kv.capacity_ratio == pytest.approx(80_000 / 11650, rel=1e-3)
    assert kv.unknown == {}


def test_full_precision_counts_the_models_own_bytes() -> None:
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        kv = kv_record(state_of(config_of("bf16"), 1000, dtype), config_of("bf16"))
        assert kv.ranks[0].bytes_per_token_formula == kv.ranks[0].bytes_per_token_full == 15 * 3 * 2 * 64 * itemsize


def test_sglangs_own_eight_bits_beside_what_the_model_would_keep() -> None:
    state = state_of(config_of("fp8"), 1000, "float8_e4m3fn")
    for rank in state["ranks"]:
        rank["device"] = "cuda:0"
    kv = kv_record(state, config_of("fp8"))
    assert (kv.effective_bits, kv.full_precision_dtype) == (8.0, "bfloat16")
    assert kv.ranks[0].bytes_per_token_formula == 15 * 3 * 2 * 64
    assert kv.ranks[0].bytes_per_token_full == 15 * 3 * 2 * 64 * 2
    assert "fp8" in kv.format


def test_without_a_budget_the_ratio_is_unknown() -> None:
    kv = kv_record(state_of(config_of("kv8_token"), 1000, kv_gib=None), config_of("kv8_token"))
    assert kv.capacity_ratio is None
    assert "--kvtuner-kv-gib" in kv.unknown["capacity_ratio"]


def test_resident_memory_of_rank_processes() -> None:
    ranks = state_of(config_of("kv4_token"), 10)["ranks"]
    ranks[1]["host"] = "elsewhere"
    here, away = device_memory(ranks)
    assert here.total_mib == pytest.approx(psutil.virtual_memory().total / 2**20)
    assert here.used_mib == pytest.approx(psutil.Process().memory_info().rss / 2**20, rel=0.1)
    assert away.used_mib is None
    assert "another host" in away.unknown["used_mib"]


def test_gpus_as_nvidia_smi_prints_them() -> None:
    first, second = parse_nvidia_smi("0, NVIDIA GeForce RTX 4090, 21610, 24564\n1, NVIDIA GeForce RTX 4090, 5, 24564\n")
    assert first.name == "GPU 0 (NVIDIA GeForce RTX 4090)"
    assert (first.used_mib, first.total_mib, second.used_mib) == (21610.0, 24564.0, 5.0)
