"""The caches of one cell: the same keys and values in every format, on the same pages, behind one page table.

`distinct` pages of random keys and values are quantized once; a pool holds copies of them, so that every page lies at
its own address and nothing has to be quantized by the gigabyte.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtuner_sglang.kernel_bench.cases import BLOCK, Shape, Storage
from kvtuner_sglang.quant import KVShape, TensorFormat
from kvtuner_triton import reference
from kvtuner_triton.decode import PackedPages
from kvtuner_triton.layout import Order, orders

DISTINCT = 64


@dataclass(frozen=True)
class Pages:
    """Keys and values (distinct, kv_heads, BLOCK, head_dim) bf16; weight (distinct, kv_heads, head_dim) fp32."""

    key: torch.Tensor
    value: torch.Tensor
    weight: torch.Tensor

    @staticmethod
    def random(shape: Shape, device: str, seed: int) -> "Pages":
        """Keys with a bias a channel, as models have."""
        random = torch.Generator(device=device).manual_seed(seed)
        size = (DISTINCT, shape.kv_heads, BLOCK, shape.head_dim)
        key, value = (torch.randn(size, generator=random, device=device) for _ in range(2))
        bias = 4 * torch.randn((1, shape.kv_heads, 1, shape.head_dim), generator=random, device=device)
        weight = torch.rand((DISTINCT, shape.kv_heads, shape.head_dim), generator=random, device=device)
        return Pages((2 * key + bias).bfloat16(), (value + 0.3).bfloat16(), weight)

    def as_read(self, store: Storage) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as attention reads them from a cache of this storage, in float64."""
        if not store.fmt.quantized:
            dtype = plain_dtype(store)
            return self.key.to(dtype).double(), self.value.to(dtype).double()
        return (_restored(store.fmt.key, self.key, self.weight), _restored(store.fmt.value, self.value, None))


def plain_dtype(store: Storage) -> torch.dtype:
    return torch.float8_e4m3fn if store.itemsize == 1 else torch.bfloat16


def _restored(fmt: TensorFormat, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return reference.decode(fmt, *reference.encode(fmt, x, weight)).double()


@dataclass(frozen=True)
class Batch:
    """Requests, their pages and queries; `pages` in all.

    table (slots, longest) int32, pages in random order; slots, seq_lens (batch,) int64; q (batch, q_heads, head_dim)
    bf16; last (batch,) int64: the page that holds the page in progress of keys per channel.
    """

    shape: Shape
    lengths: tuple[int, ...]
    pages: int
    table: torch.Tensor
    slots: torch.Tensor
    seq_lens: torch.Tensor
    q: torch.Tensor

    @staticmethod
    def random(shape: Shape, lengths: Sequence[int], device: str, seed: int) -> "Batch":
        random = torch.Generator(device=device).manual_seed(seed)
        counts = [-(-n // BLOCK) for n in lengths]
        order = torch.randperm(sum(counts), generator=random, device=device)
        table = torch.zeros((len(lengths), (max(counts) + 1) * BLOCK), dtype=torch.int32, device=device)
        for row, ids in enumerate(order.split(counts)):
            table[row, :len(ids) * BLOCK] = _tokens(ids).to(torch.int32)
        q = torch.randn((len(lengths), shape.q_heads, shape.head_dim), generator=random, device=device).bfloat16()
        return Batch(shape, tuple(lengths), sum(counts), table, torch.arange(len(lengths), device=device),
                     torch.tensor(lengths, device=device), q)

    @property
    def sm_scale(self) -> float:
        return self.shape.head_dim**-0.5

    def page_ids(self, b: int) -> torch.Tensor:
        """Pages of request b, in order."""
        return self.table[b, :self.lengths[b]:BLOCK].long() // BLOCK

    def last_pages(self) -> torch.Tensor:
        """The page of every request's last token (batch,)."""
        return torch.stack([self.page_ids(b)[-1] for b in range(len(self.lengths))])


def _tokens(ids: torch.Tensor) -> torch.Tensor:
    return (ids[:, None] * BLOCK + torch.arange(BLOCK, device=ids.device)).flatten()


@dataclass(frozen=True)
class Layer:
    """One layer's cache in a format of ours; tails (batch, BLOCK, kv_heads, head_dim) bf16, of keys per channel."""

    keys: PackedPages
    values: PackedPages
    tail_key: torch.Tensor
    tail_value: torch.Tensor


def packed_layers(pages: Pages, batch: Batch, store: Storage, layers: int) -> list[Layer]:
    """`layers` caches with equal contents, each with memory of its own."""
    shape, fmt = batch.shape, store.fmt
    layout = KVShape(shape.kv_heads, shape.head_dim, store.itemsize, store.page)
    key_order, value_order = orders(fmt, layout)
    keys = packed(fmt.key, pages.key, pages.weight, key_order, store.page)
    values = packed(fmt.value, pages.value, None, value_order, store.page)
    last = batch.last_pages() % DISTINCT
    tails = [x[last].transpose(1, 2).contiguous() for x in (pages.key, pages.value)]
    return [Layer(_copies(keys, batch.pages), _copies(values, batch.pages), *(x.clone() for x in tails))
            for _ in range(layers)]


def packed(fmt: TensorFormat, x: torch.Tensor, weight: torch.Tensor | None, order: Order, page: int) -> PackedPages:
    """x: (n, kv_heads, BLOCK, head_dim) as n pages, or, with pages of one token, as n * BLOCK of them."""
    codes, meta, extra = reference.encode(fmt, x, weight, order)
    if page == 1:
        codes, meta = (t.transpose(1, 2).flatten(0, 1).unsqueeze(2) for t in (codes, meta))
    return PackedPages(fmt.bits, codes.contiguous(), meta.contiguous(), None if extra is None else extra.contiguous())


def _copies(packed: PackedPages, blocks: int) -> PackedPages:
    """A pool of `blocks` blocks of tokens, block i as block i mod DISTINCT of `packed`."""
    return PackedPages(packed.bits, *(None if x is None else tiled(x, blocks) for x in (packed.codes, packed.meta,
                                                                                        packed.extra)))


def tiled(x: torch.Tensor, blocks: int) -> torch.Tensor:
    """x: (DISTINCT * p, ...) -> (blocks * p, ...), p pages a block of tokens."""
    rows = x.shape[0] // DISTINCT * blocks
    out = torch.empty((rows, *x.shape[1:]), dtype=x.dtype, device=x.device)
    for start in range(0, rows, x.shape[0]):
        part = out[start:start + x.shape[0]]
        part.copy_(x[:len(part)])
    return out


def plain_layers(pages: Pages, batch: Batch, store: Storage, layers: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of `layers` caches as they are: (pages, BLOCK, kv_heads, head_dim) bf16 or fp8 each."""
    key, value = (x.to(plain_dtype(store)).transpose(1, 2).contiguous().view(torch.uint8)
                  for x in (pages.key, pages.value))
    dtype = plain_dtype(store)
    return [(tiled(key, batch.pages).view(dtype), tiled(value, batch.pages).view(dtype)) for _ in range(layers)]


def truth(pages: Pages, batch: Batch, store: Storage, dtype: torch.dtype) -> torch.Tensor:
    """Attention of every query over what a cache of this storage holds, in `dtype`, softmax in fp32 or float64.

    Keys per channel: complete pages before the last token's as stored, that one as it was.
    """
    key, value = pages.as_read(store)
    own_key, own_value = (x.double() for x in (pages.key, pages.value))
    group, out = batch.shape.q_heads // batch.shape.kv_heads, torch.empty_like(batch.q, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for b, length in enumerate(batch.lengths):
        ids = batch.page_ids(b) % DISTINCT
        parts = [(key[ids], value[ids])]
        if store.fmt.key.per_channel:
            parts = [(key[ids[:-1]], value[ids[:-1]]), (own_key[ids[-1:]], own_value[ids[-1:]])]
        k, v = (torch.cat(x).transpose(0, 1).flatten(1, 2)[:, :length].to(dtype) for x in zip(*parts, strict=True))
        q = batch.q[b].unflatten(0, (-1, group)).to(dtype)
        p = torch.softmax((q @ k.transpose(1, 2)).to(wide) * batch.sm_scale, -1).to(dtype)
        out[b] = (p @ v).flatten(0, 1)
    return out
