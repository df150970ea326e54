"""What every rank really allocated, gathered and compared before the server says it is ready.

SGLang only logs a plugin hook that fails and then serves unquantized; this check stops such a start.  It has two
steps, both through the key-value store of torch.distributed: before the pools are built every rank announces what it
was asked for, and after a barrier of SGLang's own a rank that announced nothing has no plugin; once the pools exist
every rank reports what it allocated.
"""

import json
import logging
import os
import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

import kvtuner_sglang
from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.plugin.attention_choice import choose_attention
from kvtuner_sglang.plugin.options import KvtunerOptions, options_of
from kvtuner_sglang.plugin.pool import PackedKVPool
from kvtuner_sglang.plugin.refusal import refusing_in_one_sentence
from kvtuner_sglang.quant import KVShape, describe_plan, format_hash
from kvtuner_sglang.quant.layer_numbers import layer_text

logger = logging.getLogger(__name__)

# Ranks may capture graphs or compile kernels for minutes before they report; one that died ends the start anyway.
REPORT_TIMEOUT_S = 900
GIB = 1 << 30
ASKED_ON_ALL_RANKS = ("enabled", "plan_hash", "attention_asked", "package_version", "sglang_version", "page_size",
                      "kv_gib")
SAME_ON_ALL_RANKS = (*ASKED_ON_ALL_RANKS, "tokens")


def note_budget(server_args: Any, budget_bytes: int) -> None:
    """Keep what this rank may spend on keys and values, for its report."""
    object.__setattr__(server_args, "_kvtuner_budget_bytes", int(budget_bytes))


def announce(kvc: Any) -> None:
    """Before SGLang's barrier: say what this rank was asked for."""
    _store().set(_key("asked", dist.get_rank()), json.dumps(_asked(kvc.server_args, kvc.model_config)))


def compare_announcements() -> None:
    """After the barrier: raise ConfigError at a rank that announced nothing, or something else than rank 0."""
    store, asked = _store(), []
    for rank in range(dist.get_world_size()):
        if not store.check([_key("asked", rank)]):
            raise ConfigError(f"rank {rank} runs without kvtuner-sglang: install kvtuner-sglang "
                              f"{kvtuner_sglang.__version__} on its node, too.")
        asked.append(json.loads(store.get(_key("asked", rank))))
    compare(asked, ASKED_ON_ALL_RANKS)


def after_get_init_info(result: dict[str, Any], scheduler: Any) -> dict[str, Any]:
    """Add the pool's state of all ranks to what /server_info shows; stop the start if one is not as it must be.

    A server that asks nothing of the plugin shows the state of rank 0 alone, since the others may lack the plugin, and
    nothing if its pool is another than SGLang's plain one.
    """
    options = options_of(scheduler.server_args)
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    if not options.enabled and type(pool) is not MHATokenToKVPool:
        return result
    with refusing_in_one_sentence():
        own = rank_state(scheduler)
        states = _gather(own) if options.enabled or options.kvtuner_kv_gib is not None else [own]
        compare(states, SAME_ON_ALL_RANKS)
    result["kvtuner"] = _summary(scheduler, options, states)
    if options.enabled:
        logger.info("%s", _in_force(result["kvtuner"], own))
    return result


def rank_state(scheduler: Any) -> dict[str, Any]:
    """This rank's pool as allocated; raises ConfigError if quantization is on and the pool is not ours."""
    args = scheduler.server_args
    options = options_of(args)
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    plan = options.plan(scheduler.model_config.num_hidden_layers)
    if options.enabled and not isinstance(pool, PackedKVPool):
        raise ConfigError(f"quantization is on but the pool is {type(pool).__name__}: a hook of kvtuner-sglang did not "
                          "take, so reinstall it together with the SGLang version it names.")
    attention = getattr(scheduler.tp_worker.model_runner.attn_backend, "attention", None)
    if options.enabled and attention is None:
        raise ConfigError(f"quantization is on but attention is {args.attention_backend}'s: a hook of kvtuner-sglang "
                          "did not take, so reinstall it together with the SGLang version it names.")
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
        **_asked(args, scheduler.model_config), "tp_rank": scheduler.ps.tp_rank, "pp_rank": scheduler.ps.pp_rank,
        "pid": os.getpid(), "host": socket.gethostname(), "device": str(pool.device),
        "pool_class": type(pool).__name__, "attention": attention or args.attention_backend,
        "layers": [pool.start_layer, pool.start_layer + pool.layer_num],
        "kv_heads": pool.head_num, "head_dim": pool.head_dim, "dtype": str(pool.dtype).removeprefix("torch."),
        "tokens": scheduler.max_total_num_tokens,
        "pool_bytes": pool_bytes, "tail_bytes": tail_bytes,
        "budget_bytes": getattr(args, "_kvtuner_budget_bytes", None),
        "bytes_per_token": shape.bytes_per_token(local),
        "bytes_per_token_full": pool.layer_num * 2 * shape.kv_heads * shape.head_dim * shape.itemsize,
    }


def _asked(server_args: Any, model_config: Any) -> dict[str, Any]:
    """What one rank was asked for, and by which versions."""
    import sglang

    options = options_of(server_args)
    return {
        "rank": dist.get_rank(), "node_rank": server_args.node_rank, "enabled": options.enabled,
        "plan_hash": format_hash(options.plan(model_config.num_hidden_layers)), "page_size": server_args.page_size,
        "attention_asked": choose_attention(options.kvtuner_attention, server_args.device == "cpu"),
        "kv_gib": options.kvtuner_kv_gib, "package_version": kvtuner_sglang.__version__,
        "sglang_version": sglang.__version__,
    }


def _gather(state: dict[str, Any]) -> list[dict[str, Any]]:
    """States of all ranks in rank order; raises ConfigError naming a rank that does not report in time."""
    store = _store()
    store.set(_key("pool", state["rank"]), json.dumps(state))
    states = []
    for rank in range(dist.get_world_size()):
        try:
            store.wait([_key("pool", rank)], timedelta(seconds=REPORT_TIMEOUT_S))
        except dist.DistError as error:
            raise ConfigError(f"rank {rank} reported no pool within {REPORT_TIMEOUT_S} s: look at its log.") from error
        states.append(json.loads(store.get(_key("pool", rank))))
    return states


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()  # noqa: SLF001  torch has no public name for it


def _key(step: str, rank: int) -> str:
    return f"kvtuner/{step}/{rank}"


def compare(states: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    """Raise ConfigError at the first rank that differs from rank 0 in what must be equal everywhere."""
    first = states[0]
    for state in states[1:]:
        for name in names:
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
        "format": describe_plan(plan),
        "effective_bits": shape.effective_bits(plan),
        "max_total_num_tokens": scheduler.max_total_num_tokens,
        "measurement": options.measurement_only,
        "ranks": states,
    }


def _in_force(summary: dict[str, Any], own: dict[str, Any]) -> str:
    """What the log of a rank says once its pool is as asked for."""
    first, end = own["layers"]
    return (f"kvtuner: keys and values are packed: {summary['format']}; {summary['effective_bits']:g} bits an element; "
            f"this rank has layers {layer_text(range(first, end))}, {8 * own['bytes_per_token']:.0f} bits a token, "
            f"pages of {own['page_size']} tokens, attention {own['attention']}.")
