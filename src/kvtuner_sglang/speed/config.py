"""What the speed task measures."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

PositiveInt = Annotated[int, Field(gt=0)]
STRICT = ConfigDict(extra="forbid")
Backend = Literal["auto", "flashinfer", "triton"]


@dataclass(frozen=True, config=STRICT)
class DecodeCell:
    """`batch` requests at once, each with `context` tokens in the cache."""

    batch: PositiveInt
    context: PositiveInt


@dataclass(frozen=True, config=STRICT)
class CachedPrompt:
    """A prompt of `cached` + `new` tokens whose first part is in the prefix cache."""

    cached: PositiveInt
    new: PositiveInt


@dataclass(frozen=True, config=STRICT)
class SpeedConfig:
    """The same for every format of a comparison; one run is one engine.

    backend: attention of formats that the plugin does not store.  mem_fraction_static: on a GPU, the share of memory
    for weights, keys and values, so formats compare at equal memory.  new_tokens: two lengths of answer, N1 < N2.
    saturation: contexts at which as many requests are served as fit.  timeout_s: bound on the engine's process.
    """

    name: str
    backend: Backend
    mem_fraction_static: Annotated[float, Field(gt=0, lt=1)]
    context_length: PositiveInt
    chunked_prefill_tokens: PositiveInt
    prefill_cuda_graph: bool
    decode: tuple[DecodeCell, ...]
    saturation: tuple[PositiveInt, ...]
    new_tokens: tuple[PositiveInt, PositiveInt]
    ttft_tokens: tuple[PositiveInt, ...]
    ttft_cached: tuple[CachedPrompt, ...]
    warmups: PositiveInt
    repeats: PositiveInt
    ttft_repeats: PositiveInt
    timeout_s: Annotated[float, Field(gt=0)]

    @property
    def longest(self) -> int:
        """Tokens of the longest request, its answer counted."""
        decode = [cell.context for cell in self.decode] + list(self.saturation)
        ttft = [*self.ttft_tokens, *(prompt.cached + prompt.new for prompt in self.ttft_cached)]
        return max([tokens + self.new_tokens[1] for tokens in decode] + [tokens + 1 for tokens in ttft], default=0)

    @property
    def outputs_per_request(self) -> int:
        """Tokens that all answers of one decode cell leave in the prefix cache behind one prompt, at most."""
        return (self.warmups + self.repeats) * sum(self.new_tokens)
