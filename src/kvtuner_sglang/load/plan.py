"""Which requests make up a batch, and how many of their tokens the prefix cache must then hold."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvtuner_sglang.load.config import LoadWorkload, MultiturnLoad
from kvtuner_sglang.measure.prompts import PromptSource
from kvtuner_sglang.serving.client import Request

Conversation = tuple[Request, ...]


@dataclass(frozen=True)
class Level:
    """One load: so many at once (closed loop), or so many a second (open loop)."""

    concurrency: int | None = None
    rate_per_s: float | None = None

    @property
    def at(self) -> dict[str, float]:
        """The labels of this level's metrics."""
        if self.concurrency is not None:
            return {"concurrency": self.concurrency}
        return {"rate_per_s": self.rate_per_s or 0.0}

    @property
    def name(self) -> str:
        """Short, for the ids of requests."""
        return f"c{self.concurrency}" if self.concurrency is not None else f"q{self.rate_per_s:g}"

    def __str__(self) -> str:
        return f"concurrency {self.concurrency}" if self.concurrency is not None else f"{self.rate_per_s:g} req/s"


@dataclass(frozen=True)
class Batch:
    """What goes out together. A conversation's later turns hold only what is new; the generator puts the rest before.

    seed: of the arrivals of an open loop.
    """

    conversations: tuple[Conversation, ...]
    level: Level
    seed: int
    timeout_s: float

    @property
    def requests(self) -> int:
        return sum(len(turns) for turns in self.conversations)


@dataclass(frozen=True)
class Drawn:
    """The measured conversations and what fills the prefix cache for them, which goes first."""

    prime: tuple[Conversation, ...]
    measured: tuple[Conversation, ...]


class Planner:
    """Draws conversations whose own tokens begin with one that no other conversation's began with."""

    def __init__(self, workload: LoadWorkload, prompts: PromptSource, page_tokens: int) -> None:
        self.workload, self.prompts, self.page = workload, prompts, page_tokens

    def warm_up(self, count: int) -> tuple[Conversation, ...]:
        """`count` conversations of the measured lengths with nothing in the cache: each has its own shared tokens."""
        beginnings = self.prompts.take(count, self.workload.shared) if self.workload.shared else [[]] * count
        return tuple(self._conversation("warmup", beginning, own, cached=0)
                     for beginning, own in zip(beginnings, self._own(count), strict=True))

    def draw(self, kind: str) -> Drawn:
        """The workload's requests by its cache protocol, for an empty cache."""
        shared = self.prompts.take(1, self.workload.shared)[0] if self.workload.shared else []
        own = self._own(self.workload.requests)
        if getattr(self.workload, "cache", None) == "warm":
            prime = tuple(self._conversation("prime", [], tokens, cached=0) for tokens in own)
            whole = sum(len(turn) for turn in own[0])
            # The last prompt token is always computed: its logits give the first answer token.
            return Drawn(prime, tuple(self._conversation(kind, [], tokens, self._paged(whole - 1)) for tokens in own))
        cached = self._paged(len(shared))
        prime = tuple(self._conversation("prime", shared, tokens, cached=0)[:1] for tokens in self._own(1) if shared)
        return Drawn(prime, tuple(self._conversation(kind, shared, tokens, cached) for tokens in own))

    def _own(self, count: int) -> list[list[list[int]]]:
        """The tokens that are a conversation's own, turn by turn."""
        load = self.workload
        if isinstance(load, MultiturnLoad):
            drawn = self.prompts.take(count, load.turns * load.user_tokens)
            cuts = range(0, load.turns * load.user_tokens, load.user_tokens)
            return [[tokens[cut : cut + load.user_tokens] for cut in cuts] for tokens in drawn]
        return [[tokens] for tokens in self.prompts.take(count, load.prompt_tokens - load.shared)]

    def _conversation(self, kind: str, shared: Sequence[int], own: Sequence[Sequence[int]],
                      cached: int) -> Conversation:
        """`cached`: tokens of the first prompt that are in the cache; later ones find all of the turn before."""
        turns, said, answer = [], len(shared), self.workload.output_tokens
        for number, tokens in enumerate(own):
            label = f"{kind}-{own[0][0]}-turn{number}" if len(own) > 1 else f"{kind}-{own[0][0]}"
            turns.append(Request(label, kind, [*(shared if number == 0 else ()), *tokens], answer, cached))
            said += len(tokens) + answer
            cached = self._paged(said - 1)  # an answer's last token was never put into the cache
        return tuple(turns)

    def _paged(self, tokens: int) -> int:
        """The part of a prefix that whole pages hold: only those are shared."""
        return tokens // self.page * self.page


def prompt_lengths(load: LoadWorkload) -> list[int]:
    """Tokens of the prompts that the workload sends: of a conversation, of every turn."""
    if isinstance(load, MultiturnLoad):
        return [load.shared + load.user_tokens + turn * (load.user_tokens + load.output_tokens)
                for turn in range(load.turns)]
    return [load.prompt_tokens]
