"""The packed layout of one layer's pages, the same for the torch reference and the kernels.

A page holds `page_size` tokens of every kv head of the rank.  For keys, and again for values:

    codes   (pages, kv_heads, page_size, head_dim * bits / 8)   uint8
            order "plain": bits < 8 little end first, so channel c sits in byte c * bits // 8 at bit (c * bits) % 8
            order "keys", "values": fragment order, in which a GPU reads MMA operands as they are (fragments.py); the
            page_size * head_dim * bits / 8 bytes of a page and head then belong to no token alone.  The kernels'
            pages have it, those of plain torch are plain
    meta    per token   (pages, kv_heads, page_size, groups, m)  fp16
            per channel (pages, kv_heads, m, head_dim)           fp16
            m = 2: scale, zero (asymmetric); m = 1: scale (symmetric)
    extra   (pages, kv_heads, page_size, head_dim / 16 * bits / 8)   uint8, boosted keys only
            second halves of the codes of boosted channels, by slot (boost_slots); the first halves are in `codes`,
            and the sign bit of such a channel's scale is set.  Plain, or, beside order "keys", fragments.order_slots

16-bit tensors have codes of the model's dtype, (pages, kv_heads, page_size, head_dim), plain, and no meta.
One (page, head) is contiguous: a kernel reads it as one block.  Page 0 is padding: writes of padded tokens land there.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from kvtuner_sglang.quant import KVFormat, KVShape, TensorFormat

Order = Literal["plain", "keys", "values"]
FRAGMENT_HEAD_DIM = 64  # fragment order needs a multiple of it


@dataclass(frozen=True)
class PackedTensor:
    """Pages of keys, or of values, of one layer. `meta` is None for 16 bit, `extra` for all but boosted keys."""

    fmt: TensorFormat
    codes: torch.Tensor
    meta: torch.Tensor | None = None
    extra: torch.Tensor | None = None
    order: Order = "plain"

    @property
    def page_size(self) -> int:
        return self.codes.shape[2]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.codes, self.meta, self.extra) if t is not None)


def orders(fmt: KVFormat, shape: KVShape) -> tuple[Order, Order]:
    """The orders of keys and values: only what is stored by whole pages can be in fragment order."""
    fragments = fmt.key.per_channel and shape.head_dim % FRAGMENT_HEAD_DIM == 0 and shape.page_size % 32 == 0
    return ("keys" if fragments else "plain", "values" if fragments and fmt.value.quantized else "plain")


def boost_slots(head_dim: int) -> torch.Tensor:
    """The slot, 0 .. head_dim / 16 - 1, of every channel (head_dim) int64: one channel of each slot is boosted.

    Channels that tend to matter together, neighbours and the two of a rotary pair, are in different slots.  Where
    head_dim is a multiple of 64, four slots share 64 channels, so that a GPU lane, which holds a run of channels, has
    some of each of its slots.
    """
    channel = torch.arange(head_dim)
    if head_dim % 64:
        return channel % (head_dim // 16)
    return channel // 64 * 4 + (channel % 4 ^ channel % 64 // 32 * 2)


def allocate(fmt: TensorFormat, shape: KVShape, pages: int, dtype: torch.dtype, device: str,
             order: Order = "plain") -> PackedTensor:
    """Zeroed pages; `pages` counts the padding page. `dtype` is the model's, used by 16-bit tensors."""
    head = (pages, shape.kv_heads)
    if not fmt.quantized:
        codes = torch.zeros((*head, shape.page_size, shape.head_dim), dtype=dtype, device=device)
        return PackedTensor(fmt, codes)
    extra_width = fmt.boost_bytes(shape.head_dim)
    width = fmt.code_bytes(shape.head_dim, shape.itemsize) - extra_width
    codes = torch.zeros((*head, shape.page_size, width), dtype=torch.uint8, device=device)
    values = fmt.metadata_values
    meta_shape: tuple[int, ...]
    if fmt.per_channel:
        meta_shape = (*head, values, shape.head_dim)
    else:
        meta_shape = (*head, shape.page_size, fmt.groups(shape.head_dim), values)
    meta = torch.zeros(meta_shape, dtype=torch.float16, device=device)
    extra = None
    if fmt.boosted:
        extra = torch.zeros((*head, shape.page_size, extra_width), dtype=torch.uint8, device=device)
    return PackedTensor(fmt, codes, meta, extra, order)
