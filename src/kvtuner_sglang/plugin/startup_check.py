"""What every rank really allocated, gathered and compared before the server says it is ready.

SGLang only logs a plugin hook that fails and then serves unquantized; this check stops such a start.  The states go
through the key-value store of torch.distributed rather than a collective, so that a rank whose node lacks the plugin
is noticed after a bound and named.
"""

import json
import os
import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist

import kvtuner_sglang
from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.plugin.options import KvtunerOptions, options_of
from kvtuner_sglang.plugin.refusal import refusing_in_one_sentence
from kvtuner_sglang.plugin.pool import PackedKVPool
from kvtuner_sglang.quant import KVShape, format_hash

GATHER_TIMEOUT_S = 20
GIB = 1 << 30
SAME_ON_ALL_RANKS = ("enabled", "plan_hash", "package_version", "sglang_version", "page_size", "kv_gib", "tokens")


def after_get_init_info(result: dict[str, Any], scheduler: Any) -> dict[str, Any]:
    """Add the pool's state of all ranks to what /server_info shows; stop the start if one is not as it must be."""
    with refusing_in_one_sentence():
        states = _gather(rank_state(scheduler))
        compare(states)
    options = options_of(scheduler.server_args)
    result["kvtuner"] = _summary(scheduler, options, states)
    return result


def rank_state(scheduler: Any) -> dict[str, Any]:
    """This rank's pool as allocated; raises ConfigError if quantization is on and the pool is not ours."""
    import sglang

    args = scheduler.server_args
    options = options_of(args)
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    plan = options.plan(scheduler.model_config.num_hidden_layers)
    if options.enabled and not isinstance(pool, PackedKVPool):
        raise ConfigError(f"quantization is on but the pool is {type(pool).__name__}: a hook of kvtuner-sglang did not "
                          "take, so reinstall it together with the SGLang version it names.")
    shape = KVShape(pool.head_num, pool.head_dim, pool.dtype.itemsize, pool.page_size)
    local = plan[pool.start_layer : pool.start_layer + pool.layer_num]
    if isinstance(pool, PackedKVPool) and pool.plan != local:
        raise ConfigError("the pool's formats are not those asked for: reinstall kvtuner-sglang.")
    pool_bytes, tail_bytes = int(sum(pool.get_kv_size_bytes())), getattr(pool, "tail_bytes", 0)
    budget = options.kvtuner_kv_gib
    if budget is not None and pool_bytes + tail_bytes > budget * GIB:
        raise ConfigError(f"keys and values take {(pool_bytes + tail_bytes) / GIB:.3f} GiB, over the byte budget of "
                          f"{budget} GiB: a hook of kvtuner-sglang did not take, so reinstall it.")
    return {
        "rank": dist.get_rank(), "tp_rank": scheduler.ps.tp_rank, "pp_rank": scheduler.ps.pp_rank,
        "node_rank": args.node_rank, "pid": os.getpid(), "host": socket.gethostname(), "device": str(pool.device),
        "pool_class": type(pool).__name__, "layers": [pool.start_layer, pool.start_layer + pool.layer_num],
        "kv_heads": pool.head_num, "head_dim": pool.head_dim, "dtype": str(pool.dtype).removeprefix("torch."),
        "page_size": pool.page_size, "tokens": scheduler.max_total_num_tokens,
        "pool_bytes": pool_bytes, "tail_bytes": tail_bytes,
        "bytes_per_token": shape.bytes_per_token(local),
        "bytes_per_token_full": pool.layer_num * 2 * shape.kv_heads * shape.head_dim * shape.itemsize,
        "enabled": options.enabled, "plan_hash": format_hash(plan), "kv_gib": options.kvtuner_kv_gib,
        "package_version": kvtuner_sglang.__version__, "sglang_version": sglang.__version__,
    }


def _gather(state: dict[str, Any]) -> list[dict[str, Any]]:
    """States of all ranks in rank order; raises ConfigError naming a rank that does not report in time."""
    store = dist.distributed_c10d._get_default_store()  # noqa: SLF001  torch has no public name for it
    store.set(f"kvtuner/{state['rank']}", json.dumps(state))
    states = []
    for rank in range(dist.get_world_size()):
        key = f"kvtuner/{rank}"
        try:
            store.wait([key], timedelta(seconds=GATHER_TIMEOUT_S))
        except dist.DistError as error:
            raise ConfigError(f"rank {rank} reported no pool within {GATHER_TIMEOUT_S} s: install kvtuner-sglang "
                              f"{kvtuner_sglang.__version__} on its node, too.") from error
        states.append(json.loads(store.get(key)))
    return states


def compare(states: list[dict[str, Any]]) -> None:
    """Raise ConfigError at the first rank that differs from rank 0 in what must be equal everywhere."""
    first = states[0]
    for state in states[1:]:
        for name in SAME_ON_ALL_RANKS:
            if state[name] != first[name]:
                raise ConfigError(
                    f"rank {state['rank']} on node {state['node_rank']} has {name} {state[name]!r} but rank 0 has "
                    f"{first[name]!r}: start every node with the same kvtuner flags and versions."
                )


def _summary(scheduler: Any, options: KvtunerOptions, states: list[dict[str, Any]]) -> dict[str, Any]:
    plan = options.plan(scheduler.model_config.num_hidden_layers)
    first = states[0]
    shape = KVShape(first["kv_heads"], first["head_dim"], 2, first["page_size"])
    shared = {name: first[name] for name in SAME_ON_ALL_RANKS if name != "tokens"}
    return {
        **shared,
        "format": options.kv_format().describe(),
        "effective_bits": shape.effective_bits(plan),
        "max_total_num_tokens": scheduler.max_total_num_tokens,
        "measurement": options.measurement_only,
        "ranks": states,
    }
