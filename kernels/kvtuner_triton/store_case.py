"""Stores to check kernels with: requests that start and end anywhere, and what the reference says they must write."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvtuner_sglang.quant import TensorFormat
from kvtuner_sglang.quant.format import PER_CHANNEL, PER_TOKEN
from kvtuner_triton import reference
from kvtuner_triton.decode import PackedPages
from kvtuner_triton.layout import Order
from kvtuner_triton.store import extend_items, store_decode, store_extend

CONTENTS = ("normal", "bias", "steps", "constant", "tiny", "huge")


@dataclass(frozen=True)
class StoreCase:
    """Arguments of store.store_extend; `slots`, `seq_lens`, `new_lens` and `rows` are on the device."""

    q: torch.Tensor
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
        extra = () if self.keys.extra is None else (self.keys.extra,)
        return (self.keys.codes, self.keys.meta, self.values.codes, self.values.meta, self.tail_key, self.tail_value,
                *extra)

    def wrong(self, truth: "StoreCase") -> list[str]:
        """Which of what a store writes differs in any bit from `truth`."""
        names = ("key codes", "key meta", "value codes", "value meta", "tail key", "tail value", "key extra")
        return [name for name, x, y in zip(names, self.written, truth.written, strict=False)
                if not torch.equal(x.cpu().view(torch.uint8), y.view(torch.uint8))]

    def run(self, decode: bool) -> None:
        if decode:
            store_decode(self.key, self.value, self.keys, self.values, self.tail_key, self.tail_value,
                         self.req_to_token, self.slots, self.seq_lens, self.queries)
            return
        for items in self.items:
            self.store(items)

    @property
    def items(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What an extend stores before attention, and after it."""
        return extend_items(self.seq_lens.tolist(), self.new_lens.tolist(), self.tail_key.shape[1])

    def store(self, items: torch.Tensor) -> None:
        store_extend(self.key, self.value, self.keys, self.values, self.tail_key, self.tail_value, self.req_to_token,
                     self.slots, items.to(self.key.device), self.queries)

    @property
    def queries(self) -> torch.Tensor | None:
        return None if self.keys.extra is None else self.q


def random_store_case(seq_lens: Sequence[int], new_lens: Sequence[int], *, kv_heads: int, head_dim: int, page: int,
                      key_bits: int, value_bits: int, symmetric: tuple[bool, bool] = (False, False),
                      boosted: bool = False, group: int = 3, content: str = "normal",
                      dtype: torch.dtype = torch.bfloat16, seed: int = 0, device: str = "cpu") -> StoreCase:
    """Pages and tails hold nonsense; q, key and value are slices of wider rows, as those of a fused projection are.

    The elements of q have few bits, so that the weights of channels are the same however they are summed.
    """
    random = torch.Generator().manual_seed(seed)
    batch, total = len(seq_lens), sum(new_lens)
    per_request = max(seq_lens) // page + 1
    count = batch * per_request + 1

    def pages(bits: int, *meta: int, boosted: bool = False) -> PackedPages:
        def codes(width: int) -> torch.Tensor:
            return torch.randint(0, 256, (count, kv_heads, page, width), generator=random).to(torch.uint8).to(device)

        return PackedPages(bits, codes(head_dim * bits // 8),
                           torch.full((count, kv_heads, *meta), 7.0, dtype=torch.float16, device=device),
                           codes(head_dim // 32) if boosted else None)

    wide = random_content(content, (total + 2, 2, kv_heads, head_dim), random, dtype).to(device)[1:-1]
    q = torch.randint(-15, 16, (total + 2, kv_heads * (group + 1), head_dim), generator=random).div(8).to(dtype)
    tails = random_content(content, (2, batch + 2, page, kv_heads, head_dim), random, dtype).to(device)
    slots = torch.randperm(batch + 1, generator=random)[:batch] + 1
    table = torch.randint(0, 2**30, (batch + 2, per_request * page), generator=random, dtype=torch.int32)
    ids = (torch.randperm(count - 1, generator=random) + 1).view(batch, per_request, 1)
    table[slots] = (ids * page + torch.arange(page)).flatten(1).to(torch.int32)
    rows = torch.tensor([sum(new_lens[:b]) for b in range(batch)], dtype=torch.int32)
    return StoreCase(q.to(device)[1:-1, :kv_heads * group], wide[:, 0], wide[:, 1],
                     pages(key_bits, 1 if symmetric[0] else 2, head_dim, boosted=boosted),
                     pages(value_bits, page, 1, 1 if symmetric[1] else 2), tails[0], tails[1], table.to(device),
                     slots.to(device), torch.tensor(seq_lens, device=device), torch.tensor(new_lens, device=device),
                     rows.to(device))


def expected(case: StoreCase) -> StoreCase:
    """The case after the store, on the CPU, by reference.py."""
    out = StoreCase(**{name: _to_cpu(x) for name, x in vars(case).items()})
    page = case.tail_key.shape[1]
    for slot, end, new, row in zip(*(x.tolist() for x in (out.slots, out.seq_lens, out.new_lens, out.rows)),
                                   strict=True):
        first = (end - new) // page * page
        whole = [torch.cat([tail[slot, :end - new - first], x[row:row + new]])
                 for x, tail in ((out.key, out.tail_key), (out.value, out.tail_value))]
        for i in range(end // page - first // page):
            page_id = int(out.req_to_token[slot, first + i * page]) // page
            q = out.q[row + first + (i + 1) * page - 1 - (end - new)]  # of the page's last token
            key, value = (x[i * page:(i + 1) * page].transpose(0, 1) for x in whole)
            _put(out.keys, "keys", page_id, key, reference.score_weights(q, key.shape[0]))
            _put(out.values, "values", page_id, value)
        last = (end - 1) // page * page  # the page of the last token
        kept = slice(max(end - new - last, 0), end - last)
        for tail, x in zip((out.tail_key, out.tail_value), whole, strict=True):
            tail[slot, kept] = x[last - first + kept.start:]
    return out


def _put(packed: PackedPages, order: Order, page_id: int, x: torch.Tensor, weight: torch.Tensor | None = None) -> None:
    keys = order == "keys"
    fmt = TensorFormat(packed.bits, None, packed.meta.shape[2 if keys else -1] == 1, PER_CHANNEL if keys else PER_TOKEN,
                       packed.extra is not None)
    packed.codes[page_id], packed.meta[page_id], extra = reference.encode(fmt, x, weight, order)
    if packed.extra is not None:
        packed.extra[page_id] = extra


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
        return replace(x, codes=_to_cpu(x.codes), meta=_to_cpu(x.meta),
                       extra=None if x.extra is None else _to_cpu(x.extra))
    return x.cpu().clone()
