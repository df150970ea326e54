"""What both attention backends share."""

from typing import Any

import torch

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.plugin.pool import PackedKVPool


def pool_with_tails(model_runner: Any) -> PackedKVPool:
    """The model runner's pool with pages in progress for all request slots; raises ConfigError if it is not ours."""
    pool = model_runner.token_to_kv_pool
    if not isinstance(pool, PackedKVPool):
        raise ConfigError(f"attention backend kvtuner found the pool {type(pool).__name__}, not PackedKVPool: "
                          "reinstall kvtuner-sglang with the SGLang version it names.")
    pool.create_tails(model_runner.req_to_token_pool.req_to_token.shape[0])
    return pool


def noisy(x: torch.Tensor, noise: float) -> torch.Tensor:
    """x with relative noise, for measuring the noise floor (--kvtuner-kv-noise)."""
    return x * (1 + noise * torch.randn_like(x)) if noise else x


def refuse_unusual(layer: Any, k: torch.Tensor | None, save_kv_cache: bool) -> None:
    """Raise ConfigError at a layer that packed pages do not serve."""
    unusual = {
        "cross attention": layer.is_cross_attention,
        "a sliding window": (layer.sliding_window_size or -1) > -1,
        "logit soft-capping": bool(layer.logit_cap),
        "keys written around the backend": k is None or not save_kv_cache,
    }
    for name, present in unusual.items():
        if present:
            raise ConfigError(f"layer {layer.layer_id} uses {name}, which packed KV pages do not support: "
                              "give --enable-kvtuner-quant=False.")
