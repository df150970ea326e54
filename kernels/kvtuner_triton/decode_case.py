"""Decode steps to check kernels with: random ones, hostile where it is allowed, and the truth about them.

Tests and the benchmark use the same cases and the same reference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtuner_sglang.quant import TensorFormat
from kvtuner_sglang.quant.format import PER_CHANNEL
from kvtuner_triton import fragments, reference
from kvtuner_triton.decode import PackedPages
from kvtuner_triton.layout import Order, boost_slots


@dataclass(frozen=True)
class DecodeCase:
    """Arguments of one decode step of one layer, as decode.decode_attention names them; q (batch, q_heads, D)."""

    q: torch.Tensor
    keys: PackedPages
    values: PackedPages
    tail_key: torch.Tensor
    tail_value: torch.Tensor
    req_to_token: torch.Tensor
    slots: torch.Tensor
    seq_lens: torch.Tensor
    sm_scale: float

    @property
    def page(self) -> int:
        return self.tail_key.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.tail_key.shape[2]

    def history(self, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What request b attends to: keys and values (kv_heads, seq_len, head_dim) float64."""
        slot, length = int(self.slots[b]), int(self.seq_lens[b])
        count = (length - 1) // self.page
        ids = self.req_to_token[slot, :count * self.page:self.page].long() // self.page
        rest = length - count * self.page
        k = torch.cat([read(self.keys, "keys", ids), self.tail_key[slot, :rest].double().transpose(0, 1)], 1)
        v = torch.cat([read(self.values, "values", ids), self.tail_value[slot, :rest].double().transpose(0, 1)], 1)
        return k, v


@dataclass(frozen=True)
class TokenCase:
    """Arguments of one decode step over per-token formats, as decode_token.decode_token_attention names them."""

    q: torch.Tensor
    formats: tuple[TensorFormat, TensorFormat]
    keys: PackedPages
    values: PackedPages
    req_to_token: torch.Tensor
    slots: torch.Tensor
    seq_lens: torch.Tensor
    sm_scale: float

    @property
    def kv_heads(self) -> int:
        return self.keys.codes.shape[1]

    def history(self, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What request b attends to: keys and values (kv_heads, seq_len, head_dim) float64."""
        page = self.keys.codes.shape[2]
        place = self.req_to_token[int(self.slots[b]), :int(self.seq_lens[b])].long()
        k, v = (reference.decode(fmt, x.codes[place // page, :, place % page], x.meta[place // page, :, place % page])
                for fmt, x in zip(self.formats, (self.keys, self.values), strict=True))
        return k.double().transpose(0, 1), v.double().transpose(0, 1)


def random_case(seq_lens: Sequence[int], *, q_heads: int, kv_heads: int, head_dim: int, page: int, key_bits: int,
                value_bits: int, symmetric: tuple[bool, bool] = (False, False), boosted: bool = False,
                dtype: torch.dtype = torch.bfloat16, key_spread: float = 2.0, value_spread: float = 1.0,
                seed: int = 0, device: str = "cpu") -> DecodeCase:
    """Keys with a bias a channel, as models have; pages in random order; NaN and nonsense wherever nothing may read."""
    random = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, device=device)

    stored = [(n - 1) // page for n in seq_lens]
    pages, batch = sum(stored) + 3, len(seq_lens)
    bias = 2 * key_spread * normal(1, kv_heads, 1, head_dim)
    weight = torch.rand((pages, kv_heads, head_dim), generator=random, device=device) if boosted else None
    keys = pack(TensorFormat(key_bits, None, symmetric[0], PER_CHANNEL, boosted), "keys",
                 key_spread * normal(pages, kv_heads, page, head_dim) + bias, weight)
    values = pack(TensorFormat(value_bits, None, symmetric[1]), "values",
                   value_spread * (normal(pages, kv_heads, page, head_dim) + 0.3))
    slots, table, unused = random_table([n * page for n in stored], page, pages, (max(stored) + 2) * page, random)
    tails = (torch.full((batch + 2, page, kv_heads, head_dim), float("nan"), device=device, dtype=dtype)
             for _ in range(2))
    tail_key, tail_value = tails
    for slot, length, count in zip(slots.tolist(), seq_lens, stored, strict=True):
        rest = length - count * page
        tail_key[slot, :rest] = (key_spread * normal(rest, kv_heads, head_dim) + bias[0, :, 0]).to(dtype)
        tail_value[slot, :rest] = (value_spread * normal(rest, kv_heads, head_dim)).to(dtype)
    keys.meta[unused.all(1)] = float("nan")
    values.meta[unused.all(1)] = float("nan")
    return DecodeCase(normal(batch, q_heads, head_dim).to(dtype), keys, values, tail_key, tail_value, table, slots,
                      torch.tensor(seq_lens, device=device), head_dim**-0.5)


def random_table(lengths: Sequence[int], page: int, pages: int, width: int,
                 random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slots (batch), req_to_token (batch + 2, width) and who is nobody's token, (pages, page) bool; page 0 is padding.

    The first lengths[b] tokens of slots[b] are in pages of random order; the rest of the table is nonsense.
    """
    device, batch = random.device, len(lengths)
    order = torch.randperm(pages - 1, generator=random, device=device) + 1
    slots = torch.randperm(batch + 2, generator=random, device=device)[:batch]
    table = torch.randint(0, 2**30, (batch + 2, width), generator=random, device=device, dtype=torch.int32)
    unused, used = torch.ones(pages, page, dtype=torch.bool, device=device), 0
    for slot, length in zip(slots.tolist(), lengths, strict=True):
        ids = order[used:used + -(-length // page)]
        used += len(ids)
        places = (ids[:, None] * page + torch.arange(page, device=device)).flatten()[:length]
        table[slot, :length] = places.to(torch.int32)
        unused.view(-1)[places] = False
    return slots, table, unused


def random_token_case(seq_lens: Sequence[int], *, q_heads: int, kv_heads: int, head_dim: int, page: int,
                      formats: tuple[TensorFormat, TensorFormat], dtype: torch.dtype = torch.bfloat16,
                      key_spread: float = 1.0, value_spread: float = 1.0, seed: int = 0,
                      device: str = "cpu") -> TokenCase:
    """Pages in random order, of any size; NaN wherever nothing may read."""
    random = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, device=device)

    batch, pages = len(seq_lens), sum(-(-n // page) for n in seq_lens) + 2
    packed = []
    for fmt, spread in zip(formats, (key_spread, value_spread), strict=True):
        codes, meta = reference.encode(fmt, spread * (normal(pages, kv_heads, page, head_dim) + 0.3))[:2]
        packed.append(PackedPages(fmt.bits, codes, meta))
    slots, table, unused = random_table(seq_lens, page, pages, max(seq_lens) + page, random)
    for x in packed:
        x.meta.masked_fill_(unused[:, None, :, None, None], float("nan"))
    keys, values = packed
    return TokenCase(normal(batch, q_heads, head_dim).to(dtype), formats, keys, values, table, slots,
                     torch.tensor(seq_lens, device=device), head_dim**-0.5)


def attend(case: DecodeCase | TokenCase, dtype: torch.dtype) -> torch.Tensor:
    """What the visibility rule says, in plain PyTorch in `dtype`; softmax in float32, or float64 -> (batch, ...)."""
    out = torch.empty(case.q.shape, dtype=dtype, device=case.q.device)
    group = case.q.shape[1] // case.kv_heads
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for b in range(len(out)):
        k, v = (x.to(dtype) for x in case.history(b))
        q = case.q[b].unflatten(0, (-1, group)).to(dtype)
        p = torch.softmax((q @ k.transpose(1, 2)).to(wide) * case.sm_scale, -1).to(dtype)
        out[b] = (p @ v).flatten(0, 1)
    return out


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """||x - truth|| / ||truth||; NaN if x has one."""
    return ((x.double() - truth).norm() / truth.norm()).item()


def pack(fmt: TensorFormat, order: Order, x: torch.Tensor, weight: torch.Tensor | None = None) -> PackedPages:
    """Pages x (pages, kv_heads, page, head_dim) as stored; weight as reference.encode takes it."""
    codes, meta, extra = reference.encode(fmt, x, weight, order)
    return PackedPages(fmt.bits, codes.contiguous(), meta.contiguous(), extra)


def read(packed: PackedPages, order: Order, ids: torch.Tensor) -> torch.Tensor:
    """(n) page ids -> (kv_heads, n * page, head_dim) float64: what reference.decode says, in more precision."""
    codes, meta = reference.unpack(packed.codes[ids], packed.bits, order).double(), packed.meta[ids].double()
    if order == "keys":
        scale, zero = meta[:, :, :1], meta[:, :, 1:]
    else:
        scale, zero = meta[..., 0, :1], meta[..., 0, 1:]
    if packed.extra is not None:
        halves = fragments.restore_slots(packed.extra[ids])[..., boost_slots(codes.shape[-1]).to(codes.device)]
        codes = torch.where(scale < 0, 16 * codes + halves, codes)
        scale = scale.abs()
    x = codes * scale + zero if zero.numel() else (codes - 2.0 ** (packed.bits - 1)) * scale
    return x.transpose(0, 1).flatten(1, 2)
