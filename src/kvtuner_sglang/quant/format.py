"""One description of a KV format, read by the pool, the sizing, the kernels and the report.

Per token (axis 0): every token and kv head is cut along head_dim into groups of `group_size` channels; each group has
an fp16 scale and, if asymmetric, an fp16 zero.  Per channel (axis 1, keys only): every channel of a kv head has one
scale and zero for a whole page of tokens, so the page is the group.  Boosted keys are 4-bit keys per channel of which
head_dim / 16 channels of a page, those that matter most to attention scores, have 8 bits (kvtuner_triton.reference says
which they are): a few channels carry most of the error of four-bit keys.  16 bits means the model's own
precision, stored as it is.  After KVTuner (arXiv 2502.04420) and KIVI (arXiv 2402.02750); unlike both, metadata always
counts.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.quant.layer_numbers import layer_text

SUPPORTED_BITS = (16, 8, 4, 2)
PER_TOKEN = 0
PER_CHANNEL = 1
METADATA_BYTES = 2  # scale and zero are fp16
CHANNEL_PAGE_SIZES = (64, 128)  # tokens; the first is the default
TOKEN_PAGE_SIZES = (1,)
BOOSTED_BITS = 4
BOOST_DIVISOR = 16  # one of so many key channels is boosted
NO_BOOST = "give --kvtuner-key-boost False (quant.key_boost=false)"


@dataclass(frozen=True)
class TensorFormat:
    """How keys, or values, of one layer are stored.

    bits: 16 (not quantized), 8, 4 or 2.  axis: 0 per token, 1 per channel over a page.
    group_size: channels per scale on axis 0; None is the whole head.  Axis 1 ignores it: the page is the group.
    boosted: head_dim / 16 channels of every page have 8 bits (asymmetric 4-bit keys on axis 1 only).
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = False
    axis: int = PER_TOKEN
    boosted: bool = False

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise ConfigError(f"{self.bits} bits cannot be stored: choose 16, 8, 4 or 2.")
        if self.axis not in (PER_TOKEN, PER_CHANNEL):
            raise ConfigError(f"axis {self.axis} does not exist: choose 0 (per token) or 1 (per channel).")
        if self.group_size is not None and self.group_size < 1:
            raise ConfigError(f"group size {self.group_size} is not a number of channels: choose 32, 64 or head_dim.")
        if self.boosted and (not self.per_channel or self.bits != BOOSTED_BITS or self.symmetric):
            raise ConfigError(f"only asymmetric keys of {BOOSTED_BITS} bits per channel can be boosted, not "
                              f"{'symmetric' if self.symmetric else 'asymmetric'} ones of {self.bits}"
                              f"{'' if self.per_channel else ' per token'}: {NO_BOOST}.")

    @property
    def quantized(self) -> bool:
        return self.bits != 16

    @property
    def per_channel(self) -> bool:
        return self.quantized and self.axis == PER_CHANNEL

    @property
    def metadata_values(self) -> int:
        """fp16 numbers stored for one group: scale alone, or scale and zero."""
        return 1 if self.symmetric else 2

    def boosted_channels(self, head_dim: int) -> int:
        """Channels of a page with 8 bits; raises ConfigError if there is no whole number of them."""
        if not self.boosted:
            return 0
        if head_dim % BOOST_DIVISOR:
            raise ConfigError(f"head_dim {head_dim} is not a multiple of {BOOST_DIVISOR}, so no whole number of key "
                              f"channels can be boosted: {NO_BOOST}.")
        channels = head_dim // BOOST_DIVISOR
        if channels * self.bits % 8:
            raise ConfigError(f"the {channels} boosted key channels of head_dim {head_dim} fill no whole bytes at "
                              f"{self.bits} bits: {NO_BOOST}.")
        return channels

    def groups(self, head_dim: int) -> int:
        """Groups along head_dim of one token and head (axis 0); raises ConfigError if they do not divide it."""
        size = self.group_size or head_dim
        if head_dim % size:
            raise ConfigError(
                f"--kvtuner-q-group-size {size} (quant.group_size) does not divide head_dim {head_dim}: choose a "
                f"divisor of {head_dim}."
            )
        return head_dim // size

    def code_bytes(self, head_dim: int, itemsize: int) -> int:
        """Bytes of one token and head without metadata; `itemsize` is the model's bytes per element."""
        if not self.quantized:
            return head_dim * itemsize
        return self._packed_bytes(head_dim) + self.boost_bytes(head_dim)

    def boost_bytes(self, head_dim: int) -> int:
        """Of code_bytes, those that hold the second halves of boosted channels' codes."""
        return self._packed_bytes(self.boosted_channels(head_dim))

    def _packed_bytes(self, channels: int) -> int:
        if channels * self.bits % 8:
            raise ConfigError(f"{self.bits}-bit codes fill whole bytes: {channels} channels are not a multiple of "
                              f"{8 // self.bits}, so choose more bits.")
        return channels * self.bits // 8

    def metadata_bytes(self, head_dim: int, page_size: int) -> float:
        """Bytes of scale and zero that one token and head carries; a page's metadata is shared by its tokens."""
        if not self.quantized:
            return 0
        if self.per_channel:
            return head_dim * self.metadata_values * METADATA_BYTES / page_size
        return self.groups(head_dim) * self.metadata_values * METADATA_BYTES

    def describe(self) -> str:
        if not self.quantized:
            return "16 bit (not quantized)"
        where = "per channel and page" if self.per_channel else f"per token, group {self.group_size or 'head_dim'}"
        boost = f", 1 channel in {BOOST_DIVISOR} at {2 * self.bits} bit" if self.boosted else ""
        return f"{self.bits} bit {where}{boost}, {'symmetric' if self.symmetric else 'asymmetric'}"


@dataclass(frozen=True)
class KVFormat:
    """Keys and values of one layer."""

    key: TensorFormat
    value: TensorFormat

    def __post_init__(self) -> None:
        if self.value.per_channel:
            raise ConfigError("values are stored per token: set --kvtuner-axis-value 0.")

    @property
    def quantized(self) -> bool:
        return self.key.quantized or self.value.quantized

    def check(self, head_dim: int) -> None:
        """Raise ConfigError if a model with heads of this size cannot be stored so."""
        for tensor in (self.key, self.value):
            tensor.code_bytes(head_dim, METADATA_BYTES)
            if tensor.quantized and not tensor.per_channel:
                tensor.groups(head_dim)

    def describe(self) -> str:
        return f"K {self.key.describe()}; V {self.value.describe()}"


@dataclass(frozen=True)
class KVShape:
    """What a rank stores per token and layer: its own kv heads, head_dim, the model's bytes per element, the page."""

    kv_heads: int
    head_dim: int
    itemsize: int
    page_size: int

    def tensor_bytes_per_token(self, fmt: TensorFormat) -> float:
        code = fmt.code_bytes(self.head_dim, self.itemsize)
        return self.kv_heads * (code + fmt.metadata_bytes(self.head_dim, self.page_size))

    def bytes_per_token(self, plan: Sequence[KVFormat]) -> float:
        """Bytes that one token takes on this rank, over the rank's own layers, metadata counted."""
        return sum(self.tensor_bytes_per_token(f.key) + self.tensor_bytes_per_token(f.value) for f in plan)

    def tail_bytes_per_slot(self, plan: Sequence[KVFormat]) -> int:
        """Bytes of one request slot's full-precision page in progress: K and V of every per-channel layer."""
        layers = sum(1 for f in plan if f.key.per_channel)
        return layers * self.page_size * self.kv_heads * self.head_dim * 2 * self.itemsize

    def effective_bits(self, plan: Sequence[KVFormat]) -> float:
        """Mean bits per cached element, metadata counted; 16-bit tensors count as 16 whatever the model's precision."""
        sixteen_bit = KVShape(1, self.head_dim, 2, self.page_size)
        return sixteen_bit.bytes_per_token(plan) * 8 / (2 * self.head_dim * len(plan))


def kv_format(*, bits_key: int, bits_value: int, axis_key: int, axis_value: int, group_size: int | None, asym: bool,
              key_boost: bool | None, asym_value: bool | None = None) -> KVFormat:
    """Keys and values as users ask for them.

    key_boost: None boosts asymmetric 4-bit keys per channel beside values of 4 or 8 bits.  Boosted keys are paid for by
    values without a zero (symmetric), unless those have 2 bits.  asym_value, if given, says alone whether values have a
    zero.
    """
    if key_boost is None:
        key_boost = asym and axis_key == PER_CHANNEL and bits_key == BOOSTED_BITS and bits_value in (4, 8)
    symmetric_value = not asym or (key_boost and bits_value > 2)
    if asym_value is not None:
        symmetric_value = not asym_value
    return KVFormat(TensorFormat(bits_key, group_size, not asym, axis_key, key_boost),
                    TensorFormat(bits_value, group_size, symmetric_value, axis_value))


def uniform_plan(fmt: KVFormat, layers: int) -> tuple[KVFormat, ...]:
    """The same format in every layer."""
    return (fmt,) * layers


def page_tokens(formats: Iterable[KVFormat], chosen: int | None) -> int:
    """Tokens of a page of layers in these formats: `chosen`, or the default; raises ConfigError if it does not fit.

    All layers share their pages.  Where one has keys per channel, pages are what those need: layers stored per token
    keep their bytes and what a query sees, and share prefixes in larger steps.
    """
    per_channel = any(fmt.key.per_channel for fmt in formats)
    allowed = CHANNEL_PAGE_SIZES if per_channel else TOKEN_PAGE_SIZES
    if chosen is not None and chosen not in allowed:
        raise ConfigError(f"--page-size {chosen} (quant.page_size) does not fit keys stored "
                          f"{'per channel' if per_channel else 'per token'}: leave it out or choose "
                          f"{' or '.join(map(str, allowed))}.")
    return chosen or allowed[0]


def mean_bits(plan: Sequence[KVFormat]) -> float:
    """Mean bits of a code over keys and values of all layers, as papers count them: without metadata."""
    return sum(fmt.key.bits + fmt.value.bits for fmt in plan) / (2 * len(plan))


def describe_plan(plan: Sequence[KVFormat]) -> str:
    """The formats in words; with which layers have which, if they differ."""
    formats = list(dict.fromkeys(plan))
    if len(formats) == 1:
        return formats[0].describe()
    layers = (layer_text([i for i, other in enumerate(plan) if other == fmt]) for fmt in formats)
    return " | ".join(f"layers {text}: {fmt.describe()}" for text, fmt in zip(layers, formats, strict=True))


def format_hash(plan: Sequence[KVFormat]) -> str:
    """Twelve hex digits that are equal exactly when two plans store every layer alike."""
    text = json.dumps([asdict(f) for f in plan], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
