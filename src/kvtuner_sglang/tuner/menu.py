"""What a layer may choose from: pairs of a key format and a value format, with their effective bits.

A word says how a tensor is stored: its bits, then b for boosted (4-bit keys) or s for symmetric.  Keys are per channel
and page, values per token with one scale a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pydantic

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.quant import KVFormat, KVShape, TensorFormat
from kvtuner_sglang.quant.format import PER_CHANNEL, PER_TOKEN
from kvtuner_sglang.quant.plan_file import LayerFormat

Plan = tuple[KVFormat, ...]
SIXTEEN_BIT_ITEMSIZE = 2


def tensor_format(word: str, axis: int) -> TensorFormat:
    """ "4b" -> 4 bits, boosted; raises ConfigError if that cannot be stored."""
    return TensorFormat(int(word[0]), None, word.endswith("s"), axis, word.endswith("b"))


def word_of(fmt: TensorFormat) -> str:
    """The word of a format; per token with the channels of a group, if that is not the whole head: "4s g32"."""
    group = f" g{fmt.group_size}" if fmt.group_size and fmt.quantized and not fmt.per_channel else ""
    return f"{fmt.bits}{'b' if fmt.boosted else ''}{'s' if fmt.symmetric and fmt.quantized else ''}{group}"


def pair_name(fmt: KVFormat) -> str:
    """ "K4b V2s": what figures and reports call a layer's choice; different for what is stored differently."""
    token = "" if fmt.key.per_channel or not fmt.key.quantized else "token "
    return f"{token}K{word_of(fmt.key)} V{word_of(fmt.value)}"


def layer_format(fmt: KVFormat) -> LayerFormat:
    """The words of a plan file for a layer's format."""
    return pydantic.TypeAdapter(LayerFormat).validate_python({
        "nbits_key": fmt.key.bits, "nbits_value": fmt.value.bits, "axis_key": fmt.key.axis,
        "group_size": fmt.value.group_size, "asym": not fmt.key.symmetric, "key_boost": fmt.key.boosted,
        "asym_value": not fmt.value.symmetric,
    })


@dataclass(frozen=True)
class Menu:
    """Key and value formats, and what they are counted for: heads of `head_dim`, pages of `page_size` tokens."""

    key_words: tuple[str, ...]
    value_words: tuple[str, ...]
    head_dim: int
    page_size: int

    @cached_property
    def keys(self) -> tuple[TensorFormat, ...]:
        return tuple(tensor_format(word, PER_CHANNEL) for word in self.key_words)

    @cached_property
    def values(self) -> tuple[TensorFormat, ...]:
        return tuple(tensor_format(word, PER_TOKEN) for word in self.value_words)

    @cached_property
    def pairs(self) -> Plan:
        """Every key format with every value format; pair number k * len(values) + v."""
        return tuple(KVFormat(key, value) for key in self.keys for value in self.values)

    @property
    def units_per_bit(self) -> int:
        """Effective bits of every pair are whole multiples of 1 / units_per_bit: a page has a whole number of bits."""
        return 2 * self.head_dim * self.page_size

    def bits(self, plan: Sequence[KVFormat]) -> float:
        """Mean effective bits of a plan, metadata counted."""
        return effective_bits(plan, self.head_dim, self.page_size)

    def require_within(self, budget: float) -> None:
        """Raise ConfigError if heads of this size cannot be stored in a pair, or no plan has `budget` bits or less."""
        for fmt in self.pairs:
            fmt.check(self.head_dim)
        least = min(self.bits([fmt]) for fmt in self.pairs)
        if least > budget:
            raise ConfigError(f"tune.bits={budget:g} cannot be kept: the menu's least pair has {least:.4g} effective "
                              "bits; raise tune.bits or offer formats of fewer bits (tune.keys, tune.values).")


def effective_bits(plan: Sequence[KVFormat], head_dim: int, page_size: int) -> float:
    return KVShape(1, head_dim, SIXTEEN_BIT_ITEMSIZE, page_size).effective_bits(plan)
