"""Which layers of a plan can share the tables of a pass: those whose pages are read alike, by kernels run alike."""

from dataclasses import dataclass

from kvtuner_sglang.quant import KVFormat
from kvtuner_triton import decode_token
from kvtuner_triton.decode import PackedPages, Tuning, default_tuning
from kvtuner_triton.layout import PackedTensor


@dataclass(frozen=True)
class LayerKind:
    """page: tokens of a page of per-channel keys; None: per token, where every token is read as stored.

    tuning: how the decode kernel is run, which depends on the bits; it says how a step's work is divided.
    """

    page: int | None
    tuning: Tuning

    @property
    def unit(self) -> int:
        """Tokens in which a decode step's work is dealt out."""
        return self.page or decode_token.BLOCK


@dataclass(frozen=True)
class FusedLayer:
    """One layer as the kernels take it."""

    kind: LayerKind
    keys: PackedPages
    values: PackedPages


def kind_of(fmt: KVFormat, page_size: int) -> LayerKind:
    if fmt.key.per_channel:
        return LayerKind(page_size, default_tuning(fmt.key.bits, fmt.value.bits))
    return LayerKind(None, decode_token.token_tuning())


def fused_layer(fmt: KVFormat, key: PackedTensor, value: PackedTensor) -> FusedLayer:
    """The same memory, as the kernels take it."""
    keys, values = (PackedPages(store.fmt.bits, store.codes, store.meta, store.extra) for store in (key, value))
    return FusedLayer(kind_of(fmt, key.page_size), keys, values)
