"""How many tokens fit: the byte formula of `quant/` in place of SGLang's full-precision one."""

import functools
import logging
from collections.abc import Callable
from typing import Any

from sglang.srt.model_executor.pool_configurator import MemoryPoolConfig

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.plugin import startup_check
from kvtuner_sglang.plugin.attention_choice import choose_attention
from kvtuner_sglang.plugin.options import options_of
from kvtuner_sglang.plugin.pool import PackedKVPool
from kvtuner_sglang.quant import KVFormat, KVShape

logger = logging.getLogger(__name__)

GIB = 1 << 30
CPU_DEFAULT_KV_GIB = 1.0
MAX_TAIL_SHARE = 0.05


def rank_plan(kvc: Any) -> tuple[KVFormat, ...]:
    """The formats of the layers that this pipeline stage holds."""
    plan = options_of(kvc.server_args).plan(kvc.model_config.num_hidden_layers)
    return plan[kvc.layer_info.start_layer : kvc.layer_info.end_layer]


def rank_shape(kvc: Any) -> KVShape:
    """Kv heads of this tensor-parallel rank, as SGLang shards (and on CPU pads) them; of its fp8 cache, too."""
    from sglang.srt.runtime_context import get_parallel, get_schedule

    model = kvc.model_config
    dtype = kvc.model_dtype if options_of(kvc.server_args).enabled else kvc.kv_cache_dtype
    return KVShape(model.get_num_kv_heads(get_parallel().attn_tp_size), model.head_dim,
                   dtype.itemsize, get_schedule().page_size)


def tokens_in(budget_bytes: int, bytes_per_token: float, page_size: int, tail_bytes: int = 0) -> int:
    """Whole pages that fit a budget beside the tails, as tokens; one page of the budget is padding."""
    pages = int((budget_bytes - tail_bytes) // (bytes_per_token * page_size)) - 1
    return max(pages, 0) * page_size


def around_profile_available_bytes(original: Callable[..., int], kvc: Any, *args: Any, **kwargs: Any) -> int:
    """--kvtuner-kv-gib, honoured for full precision too; SGLang's own figure stays the upper bound."""
    available = _budget_bytes(original, kvc, *args, **kwargs)
    startup_check.note_budget(kvc.server_args, available)
    return available


def _budget_bytes(original: Callable[..., int], kvc: Any, *args: Any, **kwargs: Any) -> int:
    options = options_of(kvc.server_args)
    startup_check.announce(kvc)
    available = original(kvc, *args, **kwargs)  # takes the minimum over all ranks: the barrier announce() needs
    if options.enabled or options.kvtuner_kv_gib is not None:
        startup_check.compare_announcements()
    gib = options.kvtuner_kv_gib
    if gib is None and options.enabled and kvc.device == "cpu":
        gib = CPU_DEFAULT_KV_GIB
        logger.warning("kvtuner: --kvtuner-kv-gib is not set; on a CPU each rank takes %.1f GiB.", gib)
    if gib is None:
        return available
    if gib * GIB > available:
        raise ConfigError(f"--kvtuner-kv-gib {gib} is more than the {available / GIB:.2f} GiB free for keys and "
                          "values on this rank: give less.")
    return int(gib * GIB)


def around_compute_cell_size(original: Callable[..., int], self: Any, kvc: Any, num_layers: int) -> int:
    """Bytes per token, rounded up to a whole byte; the exact figure is used in calculate_pool_sizes."""
    options = options_of(kvc.server_args)
    self._kvtuner = None
    if not options.enabled and options.kvtuner_kv_gib is None:
        return original(self, kvc, num_layers)
    plan, shape = rank_plan(kvc), rank_shape(kvc)
    per_token = shape.bytes_per_token(plan)
    if not options.enabled and per_token != original(self, kvc, num_layers):
        raise ConfigError("--kvtuner-kv-gib does not know this model's KV cache layout: leave it out.")
    slots = (kvc.server_args.max_running_requests or 0) + 1
    self._kvtuner = (per_token, shape.tail_bytes_per_slot(plan) * slots)
    return -int(-per_token // 1)


def around_calculate_pool_sizes(original: Callable[..., Any], self: Any, available_bytes: int,
                                page_size: int) -> MemoryPoolConfig:
    """Tokens that fit the budget beside the tails; raises ConfigError when none do or the tails take too much."""
    if self._kvtuner is None:
        return original(self, available_bytes, page_size)
    per_token, tail_bytes = self._kvtuner
    if tail_bytes > MAX_TAIL_SHARE * available_bytes:
        raise ConfigError(f"the pages in progress take {tail_bytes / GIB:.3f} GiB of {available_bytes / GIB:.3f}, over "
                          f"{MAX_TAIL_SHARE:.0%}: lower --max-running-requests or raise --kvtuner-kv-gib.")
    tokens = tokens_in(available_bytes, per_token, page_size, tail_bytes)
    if tokens <= 0:
        raise ConfigError(f"{available_bytes / GIB:.4f} GiB hold no page of keys and values: raise --kvtuner-kv-gib.")
    return MemoryPoolConfig(max_total_num_tokens=tokens)


def around_build_mha_kv_pool(original: Callable[..., Any], kvc: Any, *, mha_pool_class: Any, **kwargs: Any) -> Any:
    """Swap SGLang's pool class for the packed one, which keeps pages in progress in the model's own precision.

    Raises ConfigError if a checkpoint asks for another: ModelOpt's do, past --kv-cache-dtype.
    """
    options = options_of(kvc.server_args)
    if options.enabled:
        if kvc.kv_cache_dtype != kvc.model_dtype:
            raise ConfigError(f"this checkpoint asks for a KV cache of {kvc.kv_cache_dtype} beside a model of "
                              f"{kvc.model_dtype}, and kvtuner packs what the model computes: use one without "
                              "kv_cache_quant_algo, or give --enable-kvtuner-quant=False.")
        fused = choose_attention(options.kvtuner_attention, kvc.device == "cpu") == "fused"
        mha_pool_class = functools.partial(PackedKVPool, plan=rank_plan(kvc), fragments=fused)
    return original(kvc, mha_pool_class=mha_pool_class, **kwargs)
