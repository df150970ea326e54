"""The packed layout of one layer's pages, the same for the torch reference and the kernels.

A page holds `page_size` tokens of every kv head of the rank.  For keys, and again for values:

    codes   (pages, kv_heads, page_size, head_dim * bits / 8)   uint8
            bits < 8: little end first, so channel c sits in byte c * bits // 8 at bit (c * bits) % 8
    meta    per token   (pages, kv_heads, page_size, groups, m)  fp16
            per channel (pages, kv_heads, m, head_dim)           fp16
            m = 2: scale, zero (asymmetric); m = 1: scale (symmetric)

16-bit tensors have codes of the model's dtype, (pages, kv_heads, page_size, head_dim), and no meta.
One (page, head) is contiguous: a kernel reads it as one block.  Page 0 is padding: writes of padded tokens land there.
"""

from dataclasses import dataclass

import torch

from kvtuner_sglang.quant import KVShape, TensorFormat


@dataclass(frozen=True)
class PackedTensor:
    """Pages of keys, or of values, of one layer. `meta` is None when the format is 16 bit."""

    fmt: TensorFormat
    codes: torch.Tensor
    meta: torch.Tensor | None

    @property
    def page_size(self) -> int:
        return self.codes.shape[2]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + (self.meta.nbytes if self.meta is not None else 0)


def allocate(fmt: TensorFormat, shape: KVShape, pages: int, dtype: torch.dtype, device: str) -> PackedTensor:
    """Zeroed pages; `pages` counts the padding page. `dtype` is the model's, used by 16-bit tensors."""
    head = (pages, shape.kv_heads)
    if not fmt.quantized:
        codes = torch.zeros((*head, shape.page_size, shape.head_dim), dtype=dtype, device=device)
        return PackedTensor(fmt, codes, None)
    width = fmt.code_bytes(shape.head_dim, shape.itemsize)
    codes = torch.zeros((*head, shape.page_size, width), dtype=torch.uint8, device=device)
    values = fmt.metadata_values
    if fmt.per_channel:
        meta_shape = (*head, values, shape.head_dim)
    else:
        meta_shape = (*head, shape.page_size, fmt.groups(shape.head_dim), values)
    return PackedTensor(fmt, codes, torch.zeros(meta_shape, dtype=torch.float16, device=device))
