"""Stores: bit for bit the reference's, and how long they take.

Keys, values and queries are slices of the rows of one fused projection, as models have them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from kvtuner_sglang.kernel_bench.cases import BLOCK, ITEMSIZE, LEAST_STEPS, Shape, Storage, storage
from kvtuner_sglang.kernel_bench.check import naming
from kvtuner_sglang.kernel_bench.decode_times import Measure
from kvtuner_sglang.kernel_bench.samples import StoreCheck, StoreTimes
from kvtuner_sglang.quant import KVShape
from kvtuner_triton import reference
from kvtuner_triton.decode import PackedPages
from kvtuner_triton.layout import allocate, orders
from kvtuner_triton.store import extend_items, store_decode, store_extend
from kvtuner_triton.store_token import store_by_location

EXTEND_TOKENS, STEP_BATCH, MOST_LAYERS = 8192, 64, 28


def works_of(store: Storage) -> tuple[str, ...]:
    """Passes that differ: a step in which every request completes a page is a step like any other per token."""
    return ("extend", "step", "step_complete") if store.fmt.key.per_channel else ("extend", "step")


@dataclass(frozen=True)
class StoreCase:
    """One pass: `tokens` new tokens of one request (extend) or one each (step), for several layers in turn.

    rows (layers, tokens, (q_heads + 2 kv_heads) * head_dim) bf16; tails (layers, 2, slots, BLOCK, kv_heads, head_dim)
    bf16, of keys and of values; page ids are 1 .. pages; table (slots, longest);
    locations (tokens,) int64: where tokens of a format with pages of one token go.
    """

    shape: Shape
    store: Storage
    work: str
    rows: torch.Tensor
    pools: list[tuple[PackedPages, PackedPages]]
    tails: torch.Tensor
    table: torch.Tensor
    slots: torch.Tensor
    seq_lens: torch.Tensor
    locations: torch.Tensor
    items: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.rows.shape[1]

    @property
    def bytes(self) -> int:
        """Read and written: new keys and values; codes and metadata of what completes a page; tails in a step.

        A page that a step completes is also read from its tail.
        """
        plain = self.shape.kv_heads * self.shape.head_dim * 2 * ITEMSIZE
        layout = KVShape(self.shape.kv_heads, self.shape.head_dim, ITEMSIZE, self.store.page)
        stored = layout.bytes_per_token([self.store.fmt])
        if self.work == "extend" or not self.store.fmt.key.per_channel:
            return round(self.tokens * (plain + stored))
        completed = int((self.seq_lens % BLOCK == 0).sum()) * BLOCK
        return round(2 * self.tokens * plain + completed * (plain + stored))

    def part(self, layer: int, first: int, heads: int) -> torch.Tensor:
        """Heads first .. of a layer's rows: (tokens, heads, head_dim)."""
        d = self.shape.head_dim
        return self.rows[layer, :, first * d:(first + heads) * d].unflatten(-1, (heads, d))

    def inputs(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, key, value."""
        q, kv = self.shape.q_heads, self.shape.kv_heads
        return self.part(layer, 0, q), self.part(layer, q, kv), self.part(layer, q + kv, kv)

    def run(self, layer: int) -> None:
        q, key, value = self.inputs(layer)
        keys, values = self.pools[layer]
        tail_key, tail_value = self.tails[layer]
        if not self.store.fmt.key.per_channel:
            store_by_location(key, value, keys, values, self.locations)
        elif self.work == "extend":
            store_extend(key, value, keys, values, tail_key, tail_value, self.table, self.slots, self.items, q)
        else:
            store_decode(key, value, keys, values, tail_key, tail_value, self.table, self.slots, self.seq_lens, q)


def store_case(shape: Shape, store: Storage, work: str, tokens: int, layers: int, device: str, seed: int) -> StoreCase:
    random = torch.Generator(device=device).manual_seed(seed)
    width = (shape.q_heads + 2 * shape.kv_heads) * shape.head_dim
    # Eighths: the sums of squares that choose boosted channels are then the same in any order.
    rows = ((8 * torch.randn((layers, tokens, width), generator=random, device=device)).round() / 8).bfloat16()
    pages = tokens // BLOCK if work == "extend" else tokens
    layout = KVShape(shape.kv_heads, shape.head_dim, ITEMSIZE, store.page)
    pools = [_pool(store, layout, (pages + 1) * BLOCK // store.page, device) for _ in range(layers)]
    ids = torch.randperm(pages, generator=random, device=device) + 1
    places = (ids[:, None] * BLOCK + torch.arange(BLOCK, device=device)).int()
    requests = 1 if work == "extend" else tokens
    table = torch.cat([torch.zeros_like(places[:1]), places]) if requests > 1 else places.view(1, -1).repeat(2, 1)
    slots = torch.arange(requests, device=device) + 1
    seq_lens = torch.full((requests,), tokens if work == "extend" else BLOCK, device=device)
    if work == "step":
        seq_lens = slots % BLOCK + 1  # as many complete a page as do on average
    tails = torch.randn((layers, 2, requests + 1, BLOCK, shape.kv_heads, shape.head_dim), generator=random,
                        device=device)
    items = extend_items([tokens], [tokens], BLOCK)[0].to(device)
    locations = table[1, :tokens] if work == "extend" else table[slots, seq_lens - 1]
    return StoreCase(shape, store, work, rows, pools, tails.bfloat16(), table, slots, seq_lens, locations.long(),
                     items)


def _pool(store: Storage, layout: KVShape, pages: int, device: str) -> tuple[PackedPages, PackedPages]:
    key_order, value_order = orders(store.fmt, layout)
    key = allocate(store.fmt.key, layout, pages, torch.bfloat16, device, key_order)
    value = allocate(store.fmt.value, layout, pages, torch.bfloat16, device, value_order)
    return (PackedPages(key.fmt.bits, key.codes, key.meta, key.extra),
            PackedPages(value.fmt.bits, value.codes, value.meta, value.extra))


def wrong_bytes(case: StoreCase) -> tuple[str, ...]:
    """Run layer 0 and name what differs from the reference on the CPU in any bit, tails included."""
    tails = case.tails[0].cpu().clone()
    case.run(0)
    q, key, value = (x.cpu() for x in case.inputs(0))
    if not case.store.fmt.key.per_channel:
        return tuple(_wrong_tokens(case, key, value))
    if case.work == "extend":
        tails[:, 1] = torch.stack([key[-BLOCK:], value[-BLOCK:]])
        ids = case.table[1, ::BLOCK].cpu().long() // BLOCK
        key, value = (x.unflatten(0, (-1, BLOCK)).transpose(1, 2) for x in (key, value))
        weight = reference.score_weights(q[BLOCK - 1::BLOCK], case.shape.kv_heads)
    else:
        done = (case.seq_lens % BLOCK == 0).cpu()
        ids = case.table[1:, 0].cpu().long()[done] // BLOCK
        tails[:, case.slots.cpu(), (case.seq_lens.cpu() - 1) % BLOCK] = torch.stack([key, value])
        key, value = (tail[1:][done].transpose(1, 2) for tail in tails)
        weight = reference.score_weights(q[done], case.shape.kv_heads)
    kept = () if torch.equal(case.tails[0].cpu(), tails) else ("tails",)
    return (*_differing(case, ids, key, value, weight), *kept)


def _differing(case: StoreCase, ids: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               weight: torch.Tensor) -> Iterator[str]:
    fmt = case.store.fmt
    layout = KVShape(case.shape.kv_heads, case.shape.head_dim, ITEMSIZE, case.store.page)
    key_order, value_order = orders(fmt, layout)
    expected = (("key", reference.encode(fmt.key, key, weight, key_order)),
                ("value", reference.encode(fmt.value, value, None, value_order)))
    for (what, parts), pages in zip(expected, case.pools[0], strict=True):
        found = (pages.codes, pages.meta, pages.extra)
        for name, x, y in zip(("codes", "meta", "extra"), found, parts, strict=True):
            if y is not None and (x is None or not _same(x.cpu()[ids], y)):
                yield f"{what} {name}"


def _wrong_tokens(case: StoreCase, key: torch.Tensor, value: torch.Tensor) -> Iterator[str]:
    at = case.locations.cpu()
    for what, fmt, x, pages in zip(("key", "value"), (case.store.fmt.key, case.store.fmt.value), (key, value),
                                   case.pools[0], strict=True):
        codes, meta, _ = reference.encode(fmt, x)
        for name, found, right in (("codes", pages.codes, codes), ("meta", pages.meta, meta)):
            if not _same(found.cpu()[at, :, 0], right):
                yield f"{what} {name}"


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.shape == y.shape and x.numpy().tobytes() == y.numpy().tobytes()


def check_stores(shape: Shape, formats: Sequence[str], device: str, seed: int, tokens: int = 1024,
                 batch: int = STEP_BATCH) -> Iterator[StoreCheck]:
    for name in formats:
        for work in works_of(storage(name)):
            with naming("kvtuner", f"store {name}"):
                case = store_case(shape, storage(name), work, tokens if work == "extend" else batch, 1, device, seed)
                yield StoreCheck(name, shape.name, work, wrong_bytes(case))


def time_stores(shape: Shape, formats: Sequence[str], repeats: int, rotated_bytes: float, measure: Measure,
                device: str, seed: int, extend_tokens: int = EXTEND_TOKENS) -> Iterator[StoreTimes]:
    """An extend of one request, and decode steps of STEP_BATCH requests, in every format."""
    for name in formats:
        store = storage(name)
        for work in works_of(store):
            tokens = extend_tokens if work == "extend" else STEP_BATCH
            with naming("kvtuner", f"store {name}"):
                size = store_case(shape, store, work, tokens, 1, device, seed).bytes
                layers = max(2, min(MOST_LAYERS, int(-(-rotated_bytes // size))))
                case = store_case(shape, store, work, tokens, layers, device, seed)
                steps = max(LEAST_STEPS, layers)
                works: dict[str, Callable[[], None]] = {work: partial(_steps, case, steps)}
                times = measure(works, repeats)[work]
            yield StoreTimes(name, shape.name, work, tokens, layers, size, tuple(round(t / steps, 3) for t in times))


def _steps(case: StoreCase, steps: int) -> None:
    for i in range(steps):
        case.run(i % len(case.pools))
