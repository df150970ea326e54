"""SGLang's bookkeeping in a few lines, driven at random, against a plain dictionary of tokens."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from paged_batch import HEAD_DIM, KV_HEADS, Q_HEADS, World

from kvtuner_sglang.quant import KVFormat
from kvtuner_triton import reference

VOCABULARY = 50


@dataclass
class Request:
    slot: int
    tokens: list[int]
    done: int = 0
    shared_pages: list[int] = field(default_factory=list)


class Scheduler:
    """SGLang's bookkeeping in a few lines: slots, pages with reference counts, a prefix cache of whole pages."""

    def __init__(self, fmt: KVFormat | Sequence[KVFormat], seed: int, page: int = 8, *, padded: bool = False,
                 unit: int | None = None, **world: Any) -> None:
        """padded: decode batches end with a request of slot 0 and length 1, as a CUDA graph's do.

        unit: prompts have up to 60 times as many tokens; None: they grow with the page.
        """
        self.random, self.page, self.padded = random.Random(seed), page, padded
        self.unit = unit or page // 8
        self.world = World(fmt, page_size=page, pages=80, slots=7, max_tokens=96 * self.unit, **world)
        g = torch.Generator().manual_seed(seed)
        self.k = torch.randn(VOCABULARY, KV_HEADS, HEAD_DIM, generator=g) * 2
        self.v = torch.randn(VOCABULARY, KV_HEADS, HEAD_DIM, generator=g)
        self.q = torch.randn(VOCABULARY, Q_HEADS, HEAD_DIM, generator=g)
        self.free_slots = list(range(1, 7))
        self.running: list[Request] = []
        self.cache: dict[tuple[int, ...], int] = {}  # tokens up to the end of a page -> page
        self.seen: Counter[str] = Counter()

    def admit(self) -> None:
        if not self.free_slots:
            return
        tokens = [self.random.randrange(VOCABULARY) for _ in range(self.random.randrange(1, 60 * self.unit))]
        if self.cache and self.random.random() < 0.6:
            tokens = [*self.random.choice(list(self.cache)), *tokens][: 60 * self.unit]
        request = Request(self.free_slots.pop(self.random.randrange(len(self.free_slots))), tokens)
        while request.done + self.page < len(tokens):  # at least one token is left to compute
            page = self.cache.get(tuple(tokens[: request.done + self.page]))
            if page is None:
                break
            where = slice(request.done, request.done + self.page)
            self.world.table[request.slot, where] = page * self.page + torch.arange(self.page, dtype=torch.int32)
            request.shared_pages.append(page)
            request.done += self.page
        self.seen["prefix hit"] += bool(request.done)
        self.running.append(request)

    def leave(self, request: Request, *, keep: bool) -> None:
        """Finish (whole pages go to the prefix cache), or abort and retract (they are freed at once)."""
        for start in range(len(request.shared_pages) * self.page, request.done, self.page):
            page = int(self.world.table[request.slot, start]) // self.page
            prefix = tuple(request.tokens[: start + self.page])
            if keep and len(prefix) == start + self.page <= request.done and prefix not in self.cache:
                self.cache[prefix] = page
            else:
                self.world.free_pages.insert(0, page)
        self.running.remove(request)
        self.free_slots.append(request.slot)

    def make_room(self) -> None:
        """Evict cached pages that no running request shares, longest prefixes first."""
        used = {page for request in self.running for page in request.shared_pages}
        for prefix in sorted(self.cache, key=len, reverse=True):
            if len(self.world.free_pages) > 60:
                return
            if self.cache[prefix] not in used:
                self.world.free_pages.insert(0, self.cache.pop(prefix))

    def step(self) -> None:
        """One batch: some requests extend by a chunk of any size, others by one token; then perhaps some leave."""
        if len(self.world.free_pages) < 40:
            self.make_room()
        for _ in range(2):
            if self.random.random() < 0.5:
                self.admit()
        batch = [r for r in self.running if self.random.random() < 0.7]
        spans = []
        for request in batch:
            waiting = len(request.tokens) - request.done
            if not waiting:
                request.tokens.append(self.random.randrange(VOCABULARY))  # the sampled token
                waiting = 1
            chunk = self.random.choice([1, self.page, waiting, self.random.randrange(1, waiting + 1)])
            end = request.done + min(chunk, waiting)
            self.world.place(request.slot, request.done, end)
            spans.append((request, request.done, end))
        if spans:
            self.check(spans)
        for request in list(self.running):
            waits = request.done == len(request.tokens)
            if len(request.tokens) > 80 * self.unit or (waits and self.random.random() < 0.05):
                self.leave(request, keep=True)
            elif self.random.random() < 0.03:
                self.seen["abort"] += 1
                self.leave(request, keep=False)

    def check(self, spans: list[tuple[Request, int, int]]) -> None:
        ids = torch.tensor([t for request, start, end in spans for t in request.tokens[start:end]])
        placed = [(r.slot, start, end) for r, start, end in spans]
        decode = all(end - start == 1 for _, start, end in spans)
        if decode and self.padded:
            placed, ids = [*placed, (0, 0, 1)], torch.cat([ids, ids[:1]])
        outs = self.world.forward_layers(placed, *(x[ids].to(self.world.device) for x in (self.q, self.k, self.v)),
                                         decode=decode)
        row = 0
        for request, start, end in spans:
            self.seen["mid-page start"] += start % self.page != 0
            self.seen["page completed"] += end // self.page > start // self.page
            position = self.random.randrange(start, end)
            for fmt, out in zip(self.world.plan, outs, strict=True):
                found, expected = out[row + position - start].cpu(), self.expected(fmt, request.tokens, position)
                assert torch.allclose(found, expected, atol=2e-5), (fmt, request, start, end, position)
            row += end - start
            request.done = end

    def expected(self, fmt: KVFormat, tokens: list[int], position: int) -> torch.Tensor:
        """What the query at `position` must see in a layer of this format, from the tokens alone.

        Keys per channel: earlier pages as stored, its own in full precision; per token: everything as stored.
        """
        ids = torch.tensor(tokens[: position + 1])
        key, value = self.k[ids].clone(), self.v[ids].clone()
        repeated = Q_HEADS // KV_HEADS
        if not fmt.key.per_channel:
            key, value = (x if not tensor.quantized else reference.decode(tensor, *reference.encode(tensor, x))
                          for x, tensor in ((key, fmt.key), (value, fmt.value)))
        own = position // self.page * self.page if fmt.key.per_channel else 0
        for first in range(0, own, self.page):
            page = slice(first, first + self.page)
            last = self.q[tokens[first + self.page - 1]]
            weight = torch.stack([last[head * repeated : (head + 1) * repeated].square().sum(0)
                                  for head in range(KV_HEADS)])
            for x, tensor in ((key, fmt.key), (value, fmt.value)):
                whole = x[page].transpose(0, 1)
                if tensor.quantized:
                    whole = reference.decode(tensor, *reference.encode(tensor, whole, weight))
                x[page] = whole.transpose(0, 1)
        scores = (
            torch.einsum("hd,thd->ht", self.q[tokens[position]], key.repeat_interleave(repeated, 1)) * HEAD_DIM**-0.5
        )
        return torch.einsum("ht,thd->hd", scores.softmax(-1), value.repeat_interleave(repeated, 1))


def run_schedule(scheduler: Scheduler, steps: int) -> None:
    """Random steps; raises AssertionError at a wrong token, or if something that must happen did not."""
    for _ in range(steps):
        scheduler.step()
    for event in ("prefix hit", "abort", "mid-page start", "page completed"):
        assert scheduler.seen[event] > steps / 60, scheduler.seen
