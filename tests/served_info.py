"""What an honest server says of itself: /server_info as the plugin fills it, for SmolLM2's shape in fp32."""

from typing import Any

import kvtuner_sglang
from kvtuner_sglang.config import RunConfig
from kvtuner_sglang.quant import KVShape, format_hash
from kvtuner_sglang.serving.verify import GIB

LAYERS = 30


def truth(config: RunConfig, model_path: str = "/no/checkpoint", host: str = "here", pid: int = 100) -> dict[str, Any]:
    """Of a server of `config` whose ranks are processes `pid`, `pid` + 1 ... of `host`."""
    dist, plan = config.dist, config.quant.plan(LAYERS)
    ranks = []
    for rank in range(dist.ranks):
        pp_rank, tp_rank = divmod(rank, dist.tp)
        layers = [pp_rank * LAYERS // dist.pp, (pp_rank + 1) * LAYERS // dist.pp]
        page = config.quant.page_tokens
        dtype, itemsize = ("float8_e4m3fn", 1) if config.quant.name == "fp8" else ("float32", 4)
        per_token = KVShape(2, 64, itemsize, page).bytes_per_token(plan[slice(*layers)])
        tokens = (int(config.server.kv_gib * GIB // (per_token * page)) - 1) * page
        ranks.append({
            "rank": rank, "tp_rank": tp_rank, "pp_rank": pp_rank, "node_rank": rank * dist.nnodes // dist.ranks,
            "host": host, "pid": pid + rank, "device": "cpu", "attention": "reference",
            "pool_class": "PackedKVPool" if config.quant.enabled else "MHATokenToKVPool",
            "layers": layers, "kv_heads": 2, "head_dim": 64, "dtype": dtype, "page_size": page, "tokens": tokens,
            "pool_bytes": int(per_token * (tokens + page)), "tail_bytes": 0, "bytes_per_token": per_token,
            "enabled": config.quant.enabled, "plan_hash": format_hash(plan), "kv_gib": config.server.kv_gib,
            "package_version": kvtuner_sglang.__version__, "sglang_version": "0.5.17",
        })
    shared = ("enabled", "plan_hash", "kv_gib", "page_size", "package_version", "sglang_version")
    kvtuner = {**{k: ranks[0][k] for k in shared}, "ranks": ranks, "format": "as asked for",
               "effective_bits": 4.5, "max_total_num_tokens": ranks[0]["tokens"],
               "measurement": {"kv_noise": 0.0, "logits_dir": None}}
    return {"model_path": model_path, "startup_time": 1.0, "kvtuner": kvtuner}
