"""The recipes that are compared: what the engine serves, keys conditioned per token, and the search below four bits."""

from kvtuner_sglang.quality.allocation import Ladder
from kvtuner_sglang.quality.recipe import PER_CHANNEL, KVRecipe, TensorRecipe

BUDGETS = (3.5, 3.25)


def per_channel(bits: int, page: int = 64, **options: bool) -> TensorRecipe:
    """Keys: one scale and zero per channel over a page."""
    return TensorRecipe(bits, PER_CHANNEL, page, **options)


def per_token(bits: int, group: int | None = None, **options: bool) -> TensorRecipe:
    """One scale and zero per token and group of channels; None is the whole head."""
    return TensorRecipe(bits, group=group, **options)


SERVED = {
    "kv8": KVRecipe(per_channel(8), per_token(8)),
    "kv4": KVRecipe(per_channel(4, boost=True), per_token(4, symmetric=True)),
    "kv4_unboosted": KVRecipe(per_channel(4), per_token(4)),
    "kv2": KVRecipe(per_channel(2), per_token(2)),
    "k8v4": KVRecipe(per_channel(8), per_token(4)),
    "k4v2": KVRecipe(per_channel(4), per_token(2)),
    "kv8_token": KVRecipe(per_token(8), per_token(8)),
    "kv4_token": KVRecipe(per_token(4), per_token(4)),
    "kv4_page128": KVRecipe(per_channel(4, 128, boost=True), per_token(4, symmetric=True)),
}

CONDITIONED = {
    "kv4_token_mean": KVRecipe(per_token(4), per_token(4), key_mean=True),
    "kv4_token_hadamard": KVRecipe(per_token(4, rotate=True), per_token(4)),
    "kv4_token_mean_hadamard": KVRecipe(per_token(4, rotate=True), per_token(4), key_mean=True),
    "kv4_token_mean_scale": KVRecipe(per_token(4), per_token(4), key_mean=True, key_scale="range"),
    "kv4_token_mean_sqrt_hadamard": KVRecipe(per_token(4, rotate=True), per_token(4), key_mean=True, key_scale="sqrt"),
    "kv8_token_mean": KVRecipe(per_token(8), per_token(8), key_mean=True),
}

BELOW_FOUR = {
    "k3v3": KVRecipe(per_channel(3), per_token(3)),
    "k3v3_clip": KVRecipe(per_channel(3, clip_search=True), per_token(3, clip_search=True)),
    "k3v3_clip_rotated_v": KVRecipe(per_channel(3, clip_search=True), per_token(3, clip_search=True, rotate=True)),
    "k3v3_page128": KVRecipe(per_channel(3, 128), per_token(3)),
    "k3v3_page128_clip_rotated_v": KVRecipe(per_channel(3, 128, clip_search=True),
                                            per_token(3, clip_search=True, rotate=True)),
    "k3v3_page128_symmetric_rotated_v": KVRecipe(per_channel(3, 128, clip_search=True),
                                                 per_token(3, clip_search=True, rotate=True, symmetric=True)),
    "k4v2_clip_rotated_v": KVRecipe(per_channel(4), per_token(2, clip_search=True, rotate=True)),
    "k4v2_v32_clip": KVRecipe(per_channel(4), per_token(2, 32, clip_search=True)),
    "k4v2_page128": KVRecipe(per_channel(4, 128), per_token(2)),
    "k4v2_page128_clip_rotated_v": KVRecipe(per_channel(4, 128), per_token(2, clip_search=True, rotate=True)),
    "k3v2_v32_clip": KVRecipe(per_channel(3, clip_search=True), per_token(2, 32, clip_search=True)),
}

# Choices for the per-layer search; the second can be served with a plan per layer, the first needs 3-bit storage.
LADDERS = {
    "layers_234": Ladder(tuple(per_channel(b, 128, clip_search=True) for b in (2, 3, 4)),
                         tuple(per_token(b, clip_search=True, rotate=True) for b in (2, 3, 4))),
    "layers_24": Ladder(tuple(per_channel(b, 128) for b in (2, 4)), tuple(per_token(b) for b in (2, 4))),
}

ALL = SERVED | CONDITIONED | BELOW_FOUR
