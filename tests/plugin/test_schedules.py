"""Random schedules over the real pool and backend against a plain dictionary of tokens.

Extends that start and end anywhere in a page, mixed chunks, decode batches, aborts, retractions, prefix hits on pages
of other requests, slots reused at once: no query ever sees a stale, lost or foreign token.
"""

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from paged_batch import HEAD_DIM, KV_HEADS, Q_HEADS, World

from kvtuner_sglang.quant import KVFormat, TensorFormat
from kvtuner_triton import reference

PAGE = 8
VOCABULARY = 50
FORMATS = [
    KVFormat(TensorFormat(4, axis=1, boosted=True), TensorFormat(4, symmetric=True)),
    KVFormat(TensorFormat(2, axis=1), TensorFormat(8)),
]


@dataclass
class Request:
    slot: int
    tokens: list[int]
    done: int = 0
    shared_pages: list[int] = field(default_factory=list)


class Scheduler:
    """SGLang's bookkeeping in a few lines: slots, pages with reference counts, a prefix cache of whole pages."""

    def __init__(self, fmt: KVFormat, seed: int) -> None:
        self.random = random.Random(seed)
        self.world = World(fmt, page_size=PAGE, pages=80, slots=7, max_tokens=96)
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
        tokens = [self.random.randrange(VOCABULARY) for _ in range(self.random.randrange(1, 60))]
        if self.cache and self.random.random() < 0.6:
            tokens = [*self.random.choice(list(self.cache)), *tokens][:60]
        request = Request(self.free_slots.pop(self.random.randrange(len(self.free_slots))), tokens)
        while request.done + PAGE < len(tokens):  # at least one token is left to compute
            page = self.cache.get(tuple(tokens[: request.done + PAGE]))
            if page is None:
                break
            where = slice(request.done, request.done + PAGE)
            self.world.table[request.slot, where] = page * PAGE + torch.arange(PAGE, dtype=torch.int32)
            request.shared_pages.append(page)
            request.done += PAGE
        self.seen["prefix hit"] += bool(request.done)
        self.running.append(request)

    def leave(self, request: Request, *, keep: bool) -> None:
        """Finish (whole pages go to the prefix cache), or abort and retract (they are freed at once)."""
        for start in range(len(request.shared_pages) * PAGE, request.done, PAGE):
            page = int(self.world.table[request.slot, start]) // PAGE
            prefix = tuple(request.tokens[: start + PAGE])
            if keep and len(prefix) == start + PAGE <= request.done and prefix not in self.cache:
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
            chunk = self.random.choice([1, PAGE, waiting, self.random.randrange(1, waiting + 1)])
            end = request.done + min(chunk, waiting)
            self.world.place(request.slot, request.done, end)
            spans.append((request, request.done, end))
        if spans:
            self.check(spans)
        for request in list(self.running):
            if len(request.tokens) > 80 or (request.done == len(request.tokens) and self.random.random() < 0.05):
                self.leave(request, keep=True)
            elif self.random.random() < 0.03:
                self.seen["abort"] += 1
                self.leave(request, keep=False)

    def check(self, spans: list[tuple[Request, int, int]]) -> None:
        ids = torch.tensor([t for request, start, end in spans for t in request.tokens[start:end]])
        out = self.world.forward(
            [(r.slot, start, end) for r, start, end in spans],
            self.q[ids],
            self.k[ids],
            self.v[ids],
            decode=all(end - start == 1 for _, start, end in spans),
        )
        row = 0
        for request, start, end in spans:
            self.seen["mid-page start"] += start % PAGE != 0
            self.seen["page completed"] += end // PAGE > start // PAGE
            position = self.random.randrange(start, end)
            expected = self.expected(request.tokens, position)
            assert torch.allclose(out[row + position - start], expected, atol=2e-5), (request, start, end, position)
            row += end - start
            request.done = end

    def expected(self, tokens: list[int], position: int) -> torch.Tensor:
        """What the query at `position` must see, from the tokens alone: earlier pages as stored, its own in full."""
        ids = torch.tensor(tokens[: position + 1])
        own = position // PAGE * PAGE
        key, value = self.k[ids].clone(), self.v[ids].clone()
        fmt, repeated = self.world.fmt, Q_HEADS // KV_HEADS
        for first in range(0, own, PAGE):
            page = slice(first, first + PAGE)
            last = self.q[tokens[first + PAGE - 1]]
            weight = torch.stack([last[head * repeated : (head + 1) * repeated].square().sum(0)
                                  for head in range(KV_HEADS)])
            for x, tensor in ((key, fmt.key), (value, fmt.value)):
                whole = x[page].transpose(0, 1)
                x[page] = reference.decode(tensor, *reference.encode(tensor, whole, weight)).transpose(0, 1)
        scores = (
            torch.einsum("hd,thd->ht", self.q[tokens[position]], key.repeat_interleave(repeated, 1)) * HEAD_DIM**-0.5
        )
        return torch.einsum("ht,thd->hd", scores.softmax(-1), value.repeat_interleave(repeated, 1))


@pytest.mark.parametrize(
    ("fmt", "steps"),
    [
        (FORMATS[0], 300),
        (FORMATS[1], 300),
        pytest.param(FORMATS[0], 5000, marks=pytest.mark.slow),
        pytest.param(FORMATS[1], 5000, marks=pytest.mark.slow),
    ],
)
def test_random_schedules_never_show_a_wrong_token(fmt, steps):
    scheduler = Scheduler(fmt, seed=FORMATS.index(fmt))
    for _ in range(steps):
        scheduler.step()
    for event in ("prefix hit", "abort", "mid-page start", "page completed"):
        assert scheduler.seen[event] > steps / 60, scheduler.seen
