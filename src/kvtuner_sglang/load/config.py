"""What the load workloads measure. Closed and open loops are kinds of their own and never mixed in one run."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
AnswerTokens = Annotated[int, Field(ge=2)]  # time per output token needs two
Repeats = Annotated[int, Field(ge=3)]  # fewer say nothing about their spread
Cache = Literal["cold", "warm", "shared_prefix"]
ROUNDS = 2  # requests per worker of a closed loop, at least: in a single burst no worker's idling could be seen
STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=STRICT)
class Slo:
    """What a request must keep to count as good: time to first token and mean time per output token, in ms."""

    ttft_ms: PositiveFloat
    tpot_ms: PositiveFloat


@dataclass(frozen=True, config=STRICT)
class SingleTurnLoad:
    """`requests` unique prompts per level and repeat.

    cache: cold (nothing cached), warm (every prompt was sent before) or shared_prefix (all begin with the same
    `shared_tokens` tokens, which are cached).
    """

    name: str
    requests: PositiveInt
    prompt_tokens: PositiveInt
    output_tokens: AnswerTokens
    cache: Cache
    shared_tokens: Annotated[int, Field(ge=0)]
    repeats: Repeats
    slo: Slo

    @property
    def longest(self) -> int:
        return self.prompt_tokens + self.output_tokens

    @property
    def shared(self) -> int:
        """Tokens with which all prompts of a batch begin."""
        return self.shared_tokens if self.cache == "shared_prefix" else 0


@dataclass(frozen=True, config=STRICT)
class ClosedLoad(SingleTurnLoad):
    """Closed loop: always `concurrency` requests in flight."""

    kind: Literal["closed"]
    concurrency: tuple[PositiveInt, ...]


@dataclass(frozen=True, config=STRICT)
class OpenLoad(SingleTurnLoad):
    """Open loop: Poisson arrivals at each rate, whatever is still in flight.

    max_dispatch_lag_ms: by how much the 99th percentile of requests may leave later than scheduled.
    """

    kind: Literal["open"]
    rates_per_s: tuple[PositiveFloat, ...]
    max_dispatch_lag_ms: PositiveFloat


@dataclass(frozen=True, config=STRICT)
class CapacityLoad(SingleTurnLoad):
    """Open loops at the rates that a bisection of `rates_per_s`, ascending, asks for; one bisection a repeat.

    A rate meets the SLO if at least `attainment` of its requests are good.
    """

    kind: Literal["capacity"]
    rates_per_s: tuple[PositiveFloat, ...]
    max_dispatch_lag_ms: PositiveFloat
    attainment: Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, config=STRICT)
class MultiturnLoad:
    """Closed loop of conversations, `concurrency` of them at once, `conversations` per level and repeat.

    All begin with the same `shared_tokens` tokens, which are cached; then come `turns` turns of `user_tokens` new
    tokens and an answer of `output_tokens`. A turn's prompt is all that was said before.
    """

    kind: Literal["multiturn"]
    name: str
    concurrency: tuple[PositiveInt, ...]
    conversations: PositiveInt
    turns: Annotated[int, Field(ge=2)]
    shared_tokens: Annotated[int, Field(ge=0)]
    user_tokens: PositiveInt
    output_tokens: AnswerTokens
    repeats: Repeats
    slo: Slo

    @property
    def shared(self) -> int:
        return self.shared_tokens

    @property
    def requests(self) -> int:
        """Conversations, which are what a worker of the closed loop takes."""
        return self.conversations

    @property
    def longest(self) -> int:
        return self.shared_tokens + self.turns * (self.user_tokens + self.output_tokens)


LoadWorkload = ClosedLoad | OpenLoad | CapacityLoad | MultiturnLoad
