"""Check and time the stores on one GPU: part of decode_bench, or python -m kvtuner_triton.store_bench."""

import sys
from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from kvtuner_sglang.quant import KVFormat, KVShape, TensorFormat, kv_format
from kvtuner_sglang.quant.format import PER_CHANNEL, PER_TOKEN
from kvtuner_triton import layout
from kvtuner_triton.decode import PackedPages
from kvtuner_triton.store import (
    EXTEND_TUNING,
    STEP_TUNING,
    StoreTuning,
    extend_items,
    store_decode,
    store_extend,
)
from kvtuner_triton.store_case import CONTENTS, expected, random_store_case
from kvtuner_triton.store_token import store_by_location
from kvtuner_triton.timing import ceilings, graph_times

PAGE, KV_HEADS, D, TOKENS, LAYERS = 64, 4, 128, 8192, 28
ROTATED_BYTES = 160e6  # more than the L2 cache
TUNINGS = tuple(StoreTuning(warps, registers) for warps, registers in
                ((2, None), (4, None), (4, 64), (8, None)))


def paged(key_bits: int, value_bits: int, boost: bool | None = None) -> KVFormat:
    return kv_format(bits_key=key_bits, bits_value=value_bits, axis_key=PER_CHANNEL, axis_value=PER_TOKEN,
                     group_size=None, asym=True, key_boost=boost)


FORMATS = {"kv4": paged(4, 4), "kv4 plain": paged(4, 4, False), "kv8": paged(8, 8), "kv2": paged(2, 2),
           "k8v4": paged(8, 4), "k4v8": paged(4, 8), "k4v2": paged(4, 2)}


def check_stores() -> Iterator[tuple[str, bool]]:
    """(what, whether every byte equals the CPU reference)."""
    kinds = (((4, 4), (False, True), True), ((4, 4), (False, False), False), ((8, 2), (True, True), False),
             ((2, 8), (False, True), False))
    for bits, symmetric, boosted in kinds:
        for content in CONTENTS:
            case = random_store_case([200, 64, 130], [150, 64, 3], kv_heads=2, head_dim=D, page=PAGE, key_bits=bits[0],
                                     value_bits=bits[1], symmetric=symmetric, boosted=boosted, content=content,
                                     device="cuda")
            truth = expected(case)
            case.run(decode=False)
            yield f"store k{bits[0]}v{bits[1]}{' boosted' * boosted} {content}", not case.wrong(truth)
    case = random_store_case([64, 70, 128, 1], [1, 1, 1, 1], kv_heads=4, head_dim=D, page=PAGE, key_bits=4,
                             value_bits=4, symmetric=(False, True), boosted=True, device="cuda")
    truth = expected(case)
    case.run(decode=True)
    yield "store kv4 boosted, decode step", not case.wrong(truth)


class Layers:
    """Keys, values and pages of `sets` layers, rows strided as in a fused projection of 28/4/128."""

    def __init__(self, fmt: KVFormat, tokens: int, pages: int) -> None:
        shape = KVShape(KV_HEADS, D, 2, PAGE)
        self.bytes = tokens * (KV_HEADS * D * 2 * 2 + shape.bytes_per_token((fmt,)))
        self.sets = max(1, min(LAYERS, int(-(-ROTATED_BYTES // self.bytes))))
        rows = torch.randn(self.sets, tokens, 36 * D, device="cuda").bfloat16()
        self.key, self.value = (rows[..., a * D:(a + 4) * D].unflatten(-1, (KV_HEADS, D)) for a in (28, 32))
        self.q = rows[..., :28 * D].unflatten(-1, (28, D)) if fmt.key.boosted else [None] * self.sets
        self.keys, self.values = ([empty_pages(t, shape, pages) for _ in range(self.sets)]
                                  for t in (fmt.key, fmt.value))


def empty_pages(fmt: TensorFormat, shape: KVShape, pages: int) -> PackedPages:
    packed = layout.allocate(fmt, shape, pages, torch.bfloat16, "cuda")
    return PackedPages(fmt.bits, packed.codes, packed.meta, packed.extra)


class Prefill(Layers):
    """One request of TOKENS tokens, stored in every layer."""

    def __init__(self, fmt: KVFormat) -> None:
        super().__init__(fmt, TOKENS, TOKENS // PAGE + 1)
        self.tails = torch.zeros(2, 2, PAGE, KV_HEADS, D, dtype=torch.bfloat16, device="cuda")
        pages = torch.randperm(TOKENS // PAGE, device="cuda") + 1
        self.table = (pages[:, None] * PAGE + torch.arange(PAGE, device="cuda")).view(1, -1).int().repeat(2, 1)
        self.slots, self.lengths = (torch.tensor([n], device="cuda") for n in (1, TOKENS))
        self.rows = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.items = extend_items([TOKENS], [TOKENS], PAGE)[0].cuda()

    def run(self, tuning: StoreTuning = EXTEND_TUNING) -> None:
        for *layer, q in zip(self.key, self.value, self.keys, self.values, self.q, strict=True):
            store_extend(*layer, *self.tails, self.table, self.slots, self.lengths, self.lengths, self.rows,
                         self.items, q, tuning)


class Step(Layers):
    """A decode step of `batch` requests in every layer; all complete a page, or they are spread over the page."""

    def __init__(self, fmt: KVFormat, batch: int, complete: bool) -> None:
        super().__init__(fmt, batch, batch + 1)
        self.tails = torch.zeros(2, batch + 1, PAGE, KV_HEADS, D, dtype=torch.bfloat16, device="cuda")
        self.slots = torch.arange(batch, device="cuda") + 1
        self.table = (torch.arange(batch + 1, device="cuda") * PAGE)[:, None] + torch.arange(PAGE, device="cuda")
        self.table = self.table.int()
        self.lengths = torch.full((batch,), PAGE, device="cuda") if complete else self.slots % PAGE + 1

    def run(self, tuning: StoreTuning = STEP_TUNING) -> None:
        for i in range(LAYERS):
            j = i % self.sets
            store_decode(self.key[j], self.value[j], self.keys[j], self.values[j], *self.tails, self.table, self.slots,
                         self.lengths, self.q[j], tuning)


class Tokens(Layers):
    """TOKENS tokens of a per-token format in every layer."""

    def __init__(self, bits: int) -> None:
        super().__init__(KVFormat(TensorFormat(bits), TensorFormat(bits)), TOKENS, TOKENS // PAGE)
        self.locations = torch.randperm(TOKENS, device="cuda")

    def run(self) -> None:
        for layer in zip(self.key, self.value, self.keys, self.values, strict=True):
            store_by_location(*layer, self.locations)


def time_stores(copy_rate: float) -> Iterator[str]:
    """Rows of the table; copy_rate in GB/s, read and write counted."""
    for name in ("kv4", "kv4 plain", "kv8", "kv2"):
        case = Prefill(FORMATS[name])
        works = {f" {t.warps} warps {t.registers}": partial(case.run, t) for t in TUNINGS}
        for how, us in graph_times(works).items():
            yield rate_row(name + how, us / case.sets, case.bytes, copy_rate)
    case = Tokens(4)
    yield rate_row("kv4_token", graph_times({"": case.run})[""] / case.sets, case.bytes, copy_rate)
    for name, complete in product(("kv4", "kv4 plain"), (False, True)):
        step = Step(FORMATS[name], 64, complete)
        for how, us in graph_times({f"{t.warps} warps {t.registers}": partial(step.run, t) for t in TUNINGS}).items():
            yield (f"store {name} decode step, batch 64, {'all complete a page' if complete else 'spread'}, {how}: "
                   f"{us / LAYERS:.2f} us a layer")


def rate_row(name: str, us: float, size: float, copy_rate: float) -> str:
    rate = size / us / 1e3
    return f"store {name:13} {TOKENS} tokens: {us:6.1f} us {rate:5.0f} GB/s {100 * rate / copy_rate:3.0f} % of copy"


def main() -> int:
    good = True
    for name, same in check_stores():
        good &= same
        print(f"  {'ok  ' if same else 'FAIL'} {name}", flush=True)  # noqa: T201 - this script's own output
    for line in time_stores(ceilings()[0]):
        print(line, flush=True)  # noqa: T201
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
