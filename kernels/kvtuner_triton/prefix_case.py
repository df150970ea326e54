"""Prefills to check kernels with: random ones, hostile where it is allowed, and the truth about them.

What is stored and what is new are drawn apart, so that reading one for the other shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtuner_sglang.quant import TensorFormat
from kvtuner_triton import reference
from kvtuner_triton.decode import PackedPages
from kvtuner_triton.decode_case import pack, random_table, read
from kvtuner_triton.layout import Order
from kvtuner_triton.prefix import PrefixTuning, prefix_attention, prefix_tables
from kvtuner_triton.unpack import (
    BLOCK,
    stored_tokens,
    unpack_blocks,
    unpack_by_location,
    unpack_pages,
)


@dataclass(frozen=True)
class PrefixCase:
    """Arguments of one layer's prefill, as prefix.prefix_attention names them; tails are None per token."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    formats: tuple[TensorFormat, TensorFormat]
    keys: PackedPages
    values: PackedPages
    tail_key: torch.Tensor | None
    tail_value: torch.Tensor | None
    req_to_token: torch.Tensor
    slots: list[int]
    starts: list[int]
    ends: list[int]
    sm_scale: float

    @property
    def page(self) -> int | None:
        """None: per-token formats."""
        return None if self.tail_key is None else self.tail_key.shape[1]

    @property
    def counts(self) -> list[int]:
        return stored_tokens(self.ends, self.page).tolist()

    def stored(self, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as stored that request b may read: (kv_heads, counts[b], head_dim) float64."""
        size = self.keys.codes.shape[2]
        place = self.req_to_token[self.slots[b], :self.counts[b]].long()
        if self.page is None:
            k, v = (reference.decode(fmt, x.codes[place // size, :, place % size],
                                     x.meta[place // size, :, place % size]).double().transpose(0, 1)
                    for fmt, x in zip(self.formats, (self.keys, self.values), strict=True))
            return k, v
        ids = place[::size] // size
        return read(self.keys, "keys", ids), read(self.values, "values", ids)

    def own(self, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in full precision from the page of starts[b] on: (kv_heads, tokens, head_dim)."""
        rows = slice(self.row(b), self.row(b + 1))
        old = self.starts[b] % self.page
        k, v = (torch.cat([tail[self.slots[b], :old], new[rows]]).transpose(0, 1)
                for tail, new in ((self.tail_key, self.k), (self.tail_value, self.v)))
        return k, v

    def row(self, b: int) -> int:
        return sum(self.ends[:b]) - sum(self.starts[:b])

    def unpack(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scratch keys and values, with three rows of NaN after them."""
        _, kv_heads, head_dim = self.k.shape
        key, value = torch.full((2, sum(self.counts) + 3, kv_heads, head_dim), float("nan"), dtype=self.q.dtype,
                                device=self.q.device)
        blocks = unpack_blocks(self.slots, self.counts, self.page or BLOCK).to(self.q.device)
        if self.page is None:
            unpack_by_location(self.keys, self.values, self.req_to_token, blocks, key, value)
        else:
            unpack_pages(self.keys, self.values, self.req_to_token, blocks, key, value)
        return key, value

    def run(self, tuning: PrefixTuning) -> torch.Tensor:
        tables = prefix_tables(self.slots, self.starts, self.ends, self.counts, tuning.tokens)
        requests, tiles = (x.to(self.q.device) for x in tables)
        out = torch.full(self.q.shape, float("nan"), dtype=self.q.dtype, device=self.q.device)
        return prefix_attention(self.q, self.k, self.v, self.tail_key, self.tail_value, *self.unpack(), requests,
                                tiles, self.sm_scale, out, tuning)


def attend(case: PrefixCase, dtype: torch.dtype, order: torch.Tensor | slice = slice(None),
           unpacked: torch.dtype | None = None) -> torch.Tensor:
    """What the visibility rule says, in plain PyTorch in `dtype`; softmax in float32, or float64 -> like q.

    order: of the channels (head_dim) that scores are summed over; another one gives another sample of the rounding.
    unpacked: what stored keys and values are rounded to before that; None: to dtype.
    """
    out = torch.empty(case.q.shape, dtype=dtype, device=case.q.device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    step = case.page or BLOCK
    for b, (start, end) in enumerate(zip(case.starts, case.ends, strict=True)):
        stored = [x.to(unpacked or dtype).to(dtype) for x in case.stored(b)]
        own = [x.to(dtype) for x in case.own(b)] if case.page else None
        for first in range(start // step * step, end, step):
            low, high = max(first, start), min(first + step, end)
            if own is None:
                k, v = (x[:, :high] for x in stored)
            else:
                begin = start // step * step
                k, v = (torch.cat([x[:, :first], y[:, first - begin:high - begin]], 1)
                        for x, y in zip(stored, own, strict=True))
            rows = slice(case.row(b) + low - start, case.row(b) + high - start)
            position = torch.arange(high, device=k.device)
            hidden = position > position[low:, None]
            q = case.q[rows].to(dtype).unflatten(1, (k.shape[0], -1)).permute(1, 2, 0, 3)  # kv head, group, row, D
            scores = (q[..., order] @ k[:, None, :, order].transpose(-1, -2)).to(wide) * case.sm_scale
            p = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1).to(dtype)
            out[rows] = (p @ v[:, None]).permute(2, 0, 1, 3).flatten(1, 2)
    return out


def random_prefix_case(spans: Sequence[tuple[int, int]], *, q_heads: int, kv_heads: int, head_dim: int, page: int,
                       formats: tuple[TensorFormat, TensorFormat], dtype: torch.dtype = torch.bfloat16,
                       key_spread: float = 1.0, value_spread: float = 1.0, seed: int = 0,
                       device: str = "cpu") -> PrefixCase:
    """spans: first new position and end of each request.  Pages in random order; NaN wherever nothing may read."""
    random = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, device=device)

    batch, per_channel = len(spans), formats[0].per_channel
    starts, ends = [start for start, _ in spans], [end for _, end in spans]
    tokens = stored_tokens(ends, page if per_channel else None).tolist()
    pages, rows = sum(-(-n // page) for n in tokens) + 2, sum(ends) - sum(starts)
    bias = 2 * key_spread * normal(1, kv_heads, 1, head_dim)
    orders: tuple[Order, Order] = ("keys", "values") if per_channel else ("plain", "plain")
    weight = normal(pages, kv_heads, head_dim).square()
    keys = pack(formats[0], orders[0], key_spread * normal(pages, kv_heads, page, head_dim) + bias, weight)
    values = pack(formats[1], orders[1], value_spread * (normal(pages, kv_heads, page, head_dim) + 0.3))
    slots, table, unused = random_table(tokens, page, pages, max(ends) + page, random)
    tails = torch.full((2, batch + 2, page, kv_heads, head_dim), float("nan"), device=device, dtype=dtype)
    for slot, start in zip(slots.tolist(), starts, strict=True):
        old = start % page
        tails[0, slot, :old] = (key_spread * normal(old, kv_heads, head_dim) + bias[0, :, 0]).to(dtype)
        tails[1, slot, :old] = (value_spread * normal(old, kv_heads, head_dim)).to(dtype)
    if per_channel:
        keys.meta[unused.all(1)] = float("nan")
    else:
        keys.meta.masked_fill_(unused[:, None, :, None, None], float("nan"))
    values.meta.masked_fill_(unused[:, None, :, None, None], float("nan"))
    fused = torch.full((rows, q_heads + 2 * kv_heads + 1, head_dim), float("nan"), device=device, dtype=dtype)
    q, k, v, _ = fused.split([q_heads, kv_heads, kv_heads, 1], 1)
    q.copy_(normal(*q.shape))
    k.copy_(key_spread * normal(*k.shape) + bias[0, :, 0])
    v.copy_(value_spread * normal(*v.shape))
    return PrefixCase(q, k, v, formats, keys, values, *(tails if per_channel else (None, None)), table,
                      slots.tolist(), starts, ends, head_dim**-0.5)

