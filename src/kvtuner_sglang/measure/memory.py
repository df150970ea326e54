"""Memory two ways: what a device shows as used, and what the KV pool really holds.

A server preallocates its pool, so used memory is the same for every bit width and proves nothing; the seed report's
table was that.  Tokens, bytes per token and pool bytes, as every rank of the engine reports them, are what counts.
"""

import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from kvtuner_sglang.config import RunConfig
from kvtuner_sglang.evidence.record import DeviceMemory, KVRecord, RankRecord
from kvtuner_sglang.quant import KVFormat, KVShape
from kvtuner_sglang.serving.verify import ITEMSIZE

MIB = 2**20
FP8_BITS = 8.0
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=index,name,memory.used,memory.total", "--format=csv,noheader,nounits")
NVIDIA_SMI_TIMEOUT_S = 20


def kv_record(state: Mapping[str, Any], config: RunConfig) -> KVRecord:
    """What the KV pool holds by `state`, the "kvtuner" part of /server_info, beside what the formula of quant/ says.

    SGLang's own fp8 cache, which the plugin only looks at, is described in its true bits.
    """
    fp8 = config.quant.kv_cache_dtype == "fp8_e4m3"
    plan = config.quant.plan(max(rank["layers"][1] for rank in state["ranks"]))
    ranks = tuple(_rank_record(rank, plan, config) for rank in state["ranks"])
    budget = round(state["kv_gib"] * 2**30) if state["kv_gib"] is not None else None
    full_tokens = None
    if budget is not None:
        full_tokens = min(int(budget // rank.bytes_per_token_full) for rank in ranks)
    tokens = state["max_total_num_tokens"]
    missing = "the server was started without --kvtuner-kv-gib"
    unknown = ("budget_bytes_per_rank", "full_precision_tokens", "capacity_ratio") if budget is None else ()
    return KVRecord(
        format="K and V fp8_e4m3 (SGLang's own)" if fp8 else state["format"], enabled=state["enabled"],
        plan_hash=state["plan_hash"], page_size=state["page_size"],
        tokens=tokens, effective_bits=FP8_BITS if fp8 else state["effective_bits"], budget_bytes_per_rank=budget,
        full_precision_dtype=_full_dtype(state["ranks"][0], config), full_precision_tokens=full_tokens,
        capacity_ratio=tokens / full_tokens if full_tokens else None,
        package_version=state["package_version"], sglang_version=state["sglang_version"], ranks=ranks,
        unknown=dict.fromkeys(unknown, missing),
    )


def _rank_record(rank: Mapping[str, Any], plan: Sequence[KVFormat], config: RunConfig) -> RankRecord:
    """Bytes per token by formula and as allocated: the pool holds one page more than it offers, for padding."""
    shape = KVShape(rank["kv_heads"], rank["head_dim"], ITEMSIZE[rank["dtype"]], rank["page_size"])
    first, last = rank["layers"]
    kept = ("rank", "tp_rank", "pp_rank", "node_rank", "host", "pid", "device", "pool_class", "attention", "kv_heads",
            "tokens", "pool_bytes", "tail_bytes")
    return RankRecord(
        **{name: rank[name] for name in kept},
        layers=(first, last),
        bytes_per_token_formula=shape.bytes_per_token(plan[first:last]),
        bytes_per_token_allocated=rank["pool_bytes"] / (rank["tokens"] + rank["page_size"]),
        bytes_per_token_full=(last - first) * 2 * shape.kv_heads * shape.head_dim * ITEMSIZE[_full_dtype(rank, config)],
    )


def _full_dtype(rank: Mapping[str, Any], config: RunConfig) -> str:
    """The precision that the model would keep: the pool's, but for SGLang's own 8 bits, whose pool says those."""
    own = config.model.dtype_cpu if rank["device"].startswith("cpu") else config.model.dtype_cuda
    return rank["dtype"] if config.quant.kv_cache_dtype == "auto" else own


def device_memory(ranks: list[dict[str, Any]]) -> tuple[DeviceMemory, ...]:
    """Used and total MiB of every GPU of this host or, on the CPU engine, of every rank process of this host."""
    if any(rank["device"].startswith("cuda") for rank in ranks):
        return _gpu_memory(ranks)
    return tuple(_rank_memory(rank) for rank in ranks)


def _gpu_memory(ranks: list[dict[str, Any]]) -> tuple[DeviceMemory, ...]:
    done = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, check=True, timeout=NVIDIA_SMI_TIMEOUT_S)
    here = parse_nvidia_smi(done.stdout)
    away = sorted({rank["host"] for rank in ranks} - {socket.gethostname()})
    return (*here, *(_elsewhere(f"GPUs of {host}", None) for host in away))


def parse_nvidia_smi(csv: str) -> tuple[DeviceMemory, ...]:
    """The rows of `nvidia-smi --query-gpu=index,name,memory.used,memory.total --format=csv,noheader,nounits`."""
    devices = []
    for line in csv.strip().splitlines():
        index, name, used, total = (field.strip() for field in line.split(","))
        devices.append(DeviceMemory(
            name=f"GPU {index} ({name})", node_rank=None, used_mib=float(used), total_mib=float(total),
            source="nvidia-smi", unknown={"node_rank": "nvidia-smi shows a host's GPUs, not nodes"},
        ))
    return tuple(devices)


def _rank_memory(rank: Mapping[str, Any]) -> DeviceMemory:
    name = f"rank {rank['rank']} (pid {rank['pid']})"
    if rank["host"] != socket.gethostname():
        return _elsewhere(name, rank["node_rank"])
    used = psutil.Process(rank["pid"]).memory_info().rss / MIB
    return DeviceMemory(name=name, node_rank=rank["node_rank"], used_mib=used,
                        total_mib=psutil.virtual_memory().total / MIB, source="resident set; RAM of the host")


def _elsewhere(name: str, node_rank: int | None) -> DeviceMemory:
    unknown = dict.fromkeys(("used_mib", "total_mib"), "it is on another host, which was not asked")
    if node_rank is None:
        unknown["node_rank"] = "a host's GPUs, not a node's"
    return DeviceMemory(name=name, node_rank=node_rank, used_mib=None, total_mib=None, source="none", unknown=unknown)
