"""Stores to check kernels with: requests that start and end anywhere, and what the reference says they must write."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvtuner_triton import fragments, reference
from kvtuner_triton.decode import PackedPages
from kvtuner_triton.store import extend_items, store_decode, store_extend_pages, store_extend_tails

CONTENTS = ("normal", "bias", "steps", "constant", "tiny", "huge")


@dataclass(frozen=True)
class StoreCase:
    """Arguments of store.store_extend_pages; `slots`, `seq_lens`, `new_lens` and `rows` are on the device."""

    key: torch.Tensor
    value: torch.Tensor
    keys: PackedPages
    values: PackedPages
    tail_key: torch.Tensor
    tail_value: torch.Tensor
    req_to_token: torch.Tensor
    slots: torch.Tensor
    seq_lens: torch.Tensor
    new_lens: torch.Tensor
    rows: torch.Tensor

    @property
    def written(self) -> tuple[torch.Tensor, ...]:
        """Everything a store writes."""
        return (self.keys.codes, self.keys.meta, self.values.codes, self.values.meta, self.tail_key, self.tail_value)

    def run(self, decode: bool) -> None:
        if decode:
            store_decode(self.key, self.value, self.keys, self.values, self.tail_key, self.tail_value,
                         self.req_to_token, self.slots, self.seq_lens)
            return
        self.store_pages()
        self.store_tails()

    def store_pages(self) -> None:
        items = extend_items(self.seq_lens.tolist(), self.new_lens.tolist(), self.tail_key.shape[1])
        store_extend_pages(self.key, self.value, self.keys, self.values, self.tail_key, self.tail_value,
                           self.req_to_token, self.slots, self.seq_lens, self.new_lens, self.rows,
                           items.to(self.key.device))

    def store_tails(self) -> None:
        store_extend_tails(self.key, self.value, self.tail_key, self.tail_value, self.slots, self.seq_lens,
                           self.new_lens, self.rows)


def random_store_case(seq_lens: Sequence[int], new_lens: Sequence[int], *, kv_heads: int, head_dim: int, page: int,
                      key_bits: int, value_bits: int, symmetric: tuple[bool, bool] = (False, False),
                      content: str = "normal", dtype: torch.dtype = torch.bfloat16, seed: int = 0,
                      device: str = "cpu") -> StoreCase:
    """Pages and tails hold nonsense; key and value are slices of wider rows, as those of a fused projection are."""
    random = torch.Generator().manual_seed(seed)

    def pages(bits: int, *meta: int) -> PackedPages:
        codes = torch.randint(0, 256, (count, kv_heads, page, head_dim * bits // 8), generator=random)
        return PackedPages(bits, codes.to(torch.uint8).to(device), torch.full((count, kv_heads, *meta), 7.0,
                                                                              dtype=torch.float16, device=device))

    batch, total = len(seq_lens), sum(new_lens)
    per_request = max(seq_lens) // page + 1
    count = batch * per_request + 1
    wide = random_content(content, (total + 2, 2, kv_heads, head_dim), random, dtype).to(device)[1:-1]
    tails = random_content(content, (2, batch + 2, page, kv_heads, head_dim), random, dtype).to(device)
    slots = torch.randperm(batch + 1, generator=random)[:batch] + 1
    table = torch.randint(0, 2**30, (batch + 2, per_request * page), generator=random, dtype=torch.int32)
    ids = (torch.randperm(count - 1, generator=random) + 1).view(batch, per_request, 1)
    table[slots] = (ids * page + torch.arange(page)).flatten(1).to(torch.int32)
    rows = torch.tensor([sum(new_lens[:b]) for b in range(batch)], dtype=torch.int32)
    return StoreCase(wide[:, 0], wide[:, 1], pages(key_bits, 1 if symmetric[0] else 2, head_dim),
                     pages(value_bits, page, 1, 1 if symmetric[1] else 2), tails[0], tails[1], table.to(device),
                     slots.to(device), torch.tensor(seq_lens, device=device), torch.tensor(new_lens, device=device),
                     rows.to(device))


def expected(case: StoreCase) -> StoreCase:
    """The case after the store, on the CPU, by reference.py and fragments.py."""
    out = StoreCase(**{name: _to_cpu(x) for name, x in vars(case).items()})
    page = case.tail_key.shape[1]
    for slot, end, new, row in zip(*(x.tolist() for x in (out.slots, out.seq_lens, out.new_lens, out.rows)),
                                   strict=True):
        first = (end - new) // page * page
        for x, packed, tail, put in ((out.key, out.keys, out.tail_key, _put_keys),
                                     (out.value, out.values, out.tail_value, _put_values)):
            whole = torch.cat([tail[slot, :end - new - first], x[row:row + new]])
            for i in range(end // page - first // page):
                page_id = int(out.req_to_token[slot, first + i * page]) // page
                put(packed, page_id, whole[i * page:(i + 1) * page].transpose(0, 1))
            last = (end - 1) // page * page  # the page of the last token
            kept = slice(max(end - new - last, 0), end - last)
            tail[slot, kept] = whole[last - first + kept.start:]
    return out


def _put_keys(packed: PackedPages, page_id: int, x: torch.Tensor) -> None:
    codes, meta = reference.quantize(x.transpose(-1, -2), packed.bits, symmetric=packed.meta.shape[2] == 1)
    packed.codes[page_id] = fragments.order_keys(codes.transpose(-1, -2), packed.bits)
    packed.meta[page_id] = meta.transpose(-1, -2)


def _put_values(packed: PackedPages, page_id: int, x: torch.Tensor) -> None:
    codes, meta = reference.quantize(x, packed.bits, symmetric=packed.meta.shape[-1] == 1)
    packed.codes[page_id] = fragments.order_values(codes, packed.bits)
    packed.meta[page_id] = meta.unsqueeze(-2)


def random_content(kind: str, shape: tuple[int, ...], random: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """All finite: what is not a number has no code."""
    x = torch.randn(shape, generator=random)
    if kind == "bias":
        x = x + 40 * torch.randn((shape[-1],), generator=random)
    elif kind == "steps":  # many values halfway between two codes
        x = torch.round(8 * x) / 16
    elif kind == "constant":
        x = torch.full(shape, -1.7)
    else:
        x = x * {"normal": 1.0, "tiny": 1e-7, "huge": 3e4}[kind]
    return x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)


def _to_cpu(x: torch.Tensor | PackedPages) -> torch.Tensor | PackedPages:
    if isinstance(x, PackedPages):
        return replace(x, codes=_to_cpu(x.codes), meta=_to_cpu(x.meta))
    return x.cpu().clone()
