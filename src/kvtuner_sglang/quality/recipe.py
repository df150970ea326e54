"""Ways to lose precision in keys and values that the server need not offer: what the transformers path can measure.

A recipe that a KVFormat can express is what the engine serves; the others (three bits as a 2-bit and a 1-bit plane,
rotated values, searched clipping, conditioned keys) are measured by fake quantization only: quantized and
dequantized at once, with the quantizer that the pool uses.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.quant import KVFormat, TensorFormat
from kvtuner_sglang.quant.format import BOOST_DIVISOR, BOOSTED_BITS
from kvtuner_triton.reference import decode, dequantize, encode, quantize

PER_TOKEN = 0
PER_CHANNEL = 1
CLIP_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
METADATA_BITS = 32  # fp16 scale and zero


@dataclass(frozen=True)
class TensorRecipe:
    """How keys, or values, are stored.

    bits: 16 is not quantized.  group: channels (axis 0; None is the whole head) or tokens of a page (axis 1).
    clip_search: of CLIP_SHARES of a group's range take the one with the least squared error.
    rotate: quantize x H instead of x, H the orthonormal Hadamard matrix of head_dim; undone after reading, which for
    values costs nothing (H goes into o_proj).
    boost: the channels of a page that matter most have 8 bits (asymmetric 4-bit keys; see kvtuner_triton.reference).
    """

    bits: int
    axis: int = PER_TOKEN
    group: int | None = None
    symmetric: bool = False
    clip_search: bool = False
    rotate: bool = False
    boost: bool = False

    def __post_init__(self) -> None:
        plain = not (self.symmetric or self.clip_search or self.rotate)
        if self.boost and (self.axis != PER_CHANNEL or self.bits != BOOSTED_BITS or not plain):
            raise ConfigError("boost is for asymmetric 4-bit keys per channel, without clip_search or rotate.")

    @property
    def quantized(self) -> bool:
        return self.bits != 16

    def effective_bits(self, head_dim: int) -> float:
        if not self.quantized:
            return 16.0
        boost = self.bits / BOOST_DIVISOR if self.boost else 0
        return self.bits + boost + METADATA_BITS / (2 if self.symmetric else 1) / (self.group or head_dim)


@dataclass(frozen=True)
class KVRecipe:
    """Keys and values of one layer.

    key_mean: a constant per channel, its mean over calibration tokens, is subtracted from keys (exact: softmax does
    not see it).  key_scale: keys are divided, and q multiplied, by the calibrated range of each channel or its square
    root.  Both are for per-token keys.
    """

    key: TensorRecipe
    value: TensorRecipe
    key_mean: bool = False
    key_scale: Literal["none", "range", "sqrt"] = "none"

    def __post_init__(self) -> None:
        if self.value.axis != PER_TOKEN:
            raise ConfigError("values are stored per token: use axis 0 for them.")
        if self.key.axis == PER_CHANNEL and (self.key_mean or self.key_scale != "none"):
            raise ConfigError("keys per channel already have a scale and zero of their own: leave key_mean and "
                              "key_scale out.")

    @property
    def page(self) -> int | None:
        """Tokens that stay in full precision together until the page is complete; None for per-token keys."""
        return self.key.group if self.key.axis == PER_CHANNEL and self.key.quantized else None

    @property
    def conditioned(self) -> bool:
        return self.key_mean or self.key_scale != "none"


def effective_bits(plan: Sequence[KVRecipe], head_dim: int) -> float:
    """Mean bits per cached element over keys and values of all layers, metadata counted."""
    total = sum(r.key.effective_bits(head_dim) + r.value.effective_bits(head_dim) for r in plan)
    return total / (2 * len(plan))


def recipe_of(fmt: KVFormat, page_size: int) -> KVRecipe:
    """The recipe that measures what the engine serves in this format with pages of `page_size` tokens."""

    def tensor(f: TensorFormat) -> TensorRecipe:
        if not f.quantized:
            return TensorRecipe(16)
        group = page_size if f.per_channel else f.group_size
        return TensorRecipe(f.bits, f.axis, group, f.symmetric, boost=f.boosted)

    return KVRecipe(tensor(fmt.key), tensor(fmt.value))


def fake_quantize(recipe: TensorRecipe, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., tokens, head_dim) as it is read back, in x's dtype; boosted keys need weight: (..., pages, head_dim).

    Per channel only whole pages are stored: tokens of an incomplete last page come back as zeros, which no query may
    read.
    """
    if not recipe.quantized:
        return x
    if recipe.rotate:
        rotation = hadamard(x.shape[-1], x.device)
        return (_quantized(recipe, x.float() @ rotation) @ rotation.T).to(x.dtype)
    return _quantized(recipe, x.float(), weight).to(x.dtype)


def _quantized(recipe: TensorRecipe, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    if recipe.axis == PER_TOKEN:
        groups = x.unflatten(-1, (-1, recipe.group or x.shape[-1]))
        return _round_trip(recipe, groups).flatten(-2)
    if recipe.group is None:
        raise ConfigError("keys per channel need a page: give group, the tokens of a page.")
    whole = x.shape[-2] // recipe.group * recipe.group
    pages = x[..., :whole, :].unflatten(-2, (-1, recipe.group))
    if recipe.boost:
        fmt = TensorFormat(recipe.bits, symmetric=recipe.symmetric, axis=PER_CHANNEL, boosted=True)
        read_back = decode(fmt, *encode(fmt, pages, weight))
    else:
        read_back = _round_trip(recipe, pages.transpose(-1, -2)).transpose(-1, -2)
    out = torch.zeros_like(x)
    out[..., :whole, :] = read_back.flatten(-3, -2)
    return out


def _round_trip(recipe: TensorRecipe, x: torch.Tensor) -> torch.Tensor:
    """Groups along the last dimension, quantized and dequantized."""

    def once(clipped: torch.Tensor) -> torch.Tensor:
        codes, meta = quantize(clipped, recipe.bits, symmetric=recipe.symmetric)
        return dequantize(codes, meta, recipe.bits)

    best = once(x)
    if not recipe.clip_search:
        return best
    error = (best - x).square().sum(-1, keepdim=True)
    low, high = x.aminmax(dim=-1, keepdim=True)
    middle, half = (low + high) / 2, (high - low) / 2
    for kept in CLIP_SHARES[1:]:
        tried = once(x.clamp(middle - kept * half, middle + kept * half))
        tried_error = (tried - x).square().sum(-1, keepdim=True)
        better = tried_error < error
        best, error = torch.where(better, tried, best), torch.where(better, tried_error, error)
    return best


def hadamard(size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The orthonormal Hadamard matrix (size, size) fp32 of Sylvester's construction; raises ConfigError if none is."""
    if size & (size - 1):
        raise ConfigError(f"a Hadamard rotation needs a power of two, head_dim is {size}: leave rotate out.")
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)
