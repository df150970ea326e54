"""Records in the shape of real runs, made here: no figure in them was measured."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from kvtuner_sglang.config import RunConfig, SeedTests, parse
from kvtuner_sglang.evidence.assemble import Figures, assemble
from kvtuner_sglang.evidence.record import (
    DeviceMemory,
    Environment,
    Metric,
    RunRecord,
    SamplesFile,
    metric_key,
)
from kvtuner_sglang.load.figures import latencies, level_metrics, over_repeats
from kvtuner_sglang.measure.memory import kv_record
from kvtuner_sglang.quant import KVShape, describe_plan
from kvtuner_sglang.serving.client import Sample

CONF = Path(__file__).parents[2] / "conf"
CHECKPOINT = SimpleNamespace(
    source="a test", sha256="d" * 64, architecture="LlamaForCausalLM", layers=30, q_heads=9, kv_heads=3, head_dim=64,
    parameters=134_500_000, dtype_name="float32",
)
BUDGET = 2**28


def state_of(config: RunConfig, host: str) -> dict[str, Any]:
    """What /server_info says of the ranks of `config`, with as many tokens as the formula gives every budget."""
    dist, ranks = config.dist, []
    layers = 30 // dist.pp
    plan = config.quant.plan(30)
    bytes_per_token = [KVShape(3, 64, 4, 1).bytes_per_token(plan[i * layers : (i + 1) * layers])
                       for i in range(dist.pp)]
    tokens = int(BUDGET // max(bytes_per_token))
    for rank in range(dist.ranks):
        pp_rank = rank // dist.tp
        ranks.append({
            "rank": rank, "tp_rank": rank % dist.tp, "pp_rank": pp_rank, "node_rank": rank * dist.nnodes // dist.ranks,
            "pid": 4000 + rank, "host": host, "device": "cpu",
            "attention": "reference", "pool_class": "PackedKVPool" if config.quant.enabled else "MHATokenToKVPool",
            "layers": [pp_rank * layers, (pp_rank + 1) * layers], "kv_heads": 3, "head_dim": 64, "dtype": "float32",
            "page_size": 1, "tokens": tokens, "pool_bytes": int((tokens + 1) * bytes_per_token[pp_rank]),
            "tail_bytes": 0,
        })
    return {"format": describe_plan(plan), "enabled": config.quant.enabled, "page_size": 1,
            "plan_hash": "0123456789ab", "kv_gib": 0.25, "max_total_num_tokens": tokens, "effective_bits": 4.5,
            "package_version": "0.1.0", "sglang_version": "0.5.17", "ranks": ranks}


def metric(middle: float, unit: str, n: int) -> Metric:
    return Metric(unit=unit, n=n, mean=middle * 1.02, p50=middle, p90=middle * 1.2, p99=middle * 1.25,
                  min=middle * 0.9, max=middle * 1.25)


def load_metrics_of(config: RunConfig) -> dict[str, Metric]:
    """Ten requests a repeat, sent together, of 100 ms to the first token and 50 ms to each of two more."""
    load = config.workload
    at_s = (0.1, 0.15, 0.2)
    repeats = [[Sample("r-turn0", "k", 10, 3, 0.0, 0.0, ended_s=1.0 + 0.1 * number, token_times_s=at_s,
                       cached_tokens=64, retractions=number) for _ in range(10)] for number in range(load.repeats)]
    levels = [{"rate_per_s": rate} for rate in getattr(load, "rates_per_s", ())] or [
        {"concurrency": number} for number in load.concurrency]
    found = {name: value for at in levels for name, value in level_metrics(repeats, load.slo, 1, at).items()}
    if load.kind in ("open", "capacity"):
        found |= {metric_key("dispatch_lag_ms", **at): metric(2.0, "ms", 10) for at in levels}
    if load.kind == "capacity":
        found["capacity_per_s"] = over_repeats([0.5, 0.5, 0.7], "req/s")
    if load.kind == "multiturn":
        found |= {name: value for at in levels for turn in range(load.turns)
                  for name, value in latencies(repeats[0], {**at, "turn": turn + 1}).items()}
    return found


def metrics_of(config: RunConfig) -> dict[str, Metric]:
    if not isinstance(config.workload, SeedTests):
        return load_metrics_of(config)
    load = config.workload.throughput
    found = {f"ttft_ms/prompt_tokens={n}": metric(20.0 + n / 2, "ms", 5) for n in config.workload.ttft.prompt_tokens}
    for level in load.concurrency:
        found |= {
            f"requests_per_s/concurrency={level}": metric(1.5 * level**0.5, "req/s", 1),
            f"output_tokens_per_s/concurrency={level}": metric(24.0 * level**0.5, "tok/s", 1),
            f"latency_ms/concurrency={level}": metric(600.0 * level**0.5, "ms", load.requests),
            f"tpot_ms/concurrency={level}": metric(35.0 * level**0.5, "ms", load.requests),
        }
    return found


def environment_of(host: str, sha: str) -> Environment:
    no_gpu = dict.fromkeys(("gpus", "gpu_driver", "gpu_clocks", "gpu_topology", "cuda"), "no GPU here")
    return Environment(
        host=host, os="Linux", python="3.11.1", git_sha=sha, git_dirty=False, lock_file="cpu.txt",
        lock_sha256="b" * 64, packages={"sglang": "0.5.17", "triton": None}, cpu="Test CPU", cpu_cores=2, ram_mib=1000,
        gpus=None, gpu_driver=None, gpu_clocks=None, gpu_topology=None, cuda=None, unknown=no_gpu,
    )


@pytest.fixture(scope="session")
def make_run() -> Callable[..., RunRecord]:
    """make_run("quant=kv4", ..., status="ok", host=..., sha=...) -> the record such a run would leave."""

    def make(*overrides: str, status: Any = "ok", host: str = "test-host", sha: str = "a" * 40) -> RunRecord:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = parse(OmegaConf.to_container(compose("config", list(overrides)), resolve=True))
        commands = [
            SimpleNamespace(
                node_rank=node, host="127.0.0.1", http_port=30000 + node, environment={"GLOO_SOCKET_IFNAME": "lo"},
                argv=("python", "-m", "sglang.launch_server", "--model-path", "/models/a b", "--node-rank", str(node),
                      *(("--enable-kvtuner-quant", "--kvtuner-nbits-key", str(config.quant.nbits_key))
                        if config.quant.enabled else ()),
                      *(("--kv-cache-dtype", dtype) if (dtype := config.quant.kv_cache_dtype) != "auto" else ()),
                      "--kvtuner-heartbeat-dir", "hb"),
            )
            for node in range(config.dist.nnodes)
        ]
        memory = tuple(DeviceMemory(name=f"rank {rank} (pid {4000 + rank})", node_rank=0, used_mib=900.0,
                                    total_mib=8000.0, source="resident set; RAM of the host")
                       for rank in range(config.dist.ranks))
        figures = Figures(metrics=metrics_of(config), kv=kv_record(state_of(config, host), config), memory=memory,
                          rules=("http_200: The server answered, and answered 200.",), warnings=("something odd.",))
        return assemble(
            config, overrides=overrides, started="2026-01-02T03:04:05+00:00", status=status,
            reason=None if status == "ok" else "rank 3 on node 1 died", environment=environment_of(host, sha),
            samples=SamplesFile(file="requests.jsonl", count=42, sha256="c" * 64), group=None, commands=commands,
            checkpoint=CHECKPOINT, figures=figures if status == "ok" else None,
        )

    return make
