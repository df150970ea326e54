"""Time to first token: streamed, unique prompts of exact lengths, a cold prefix cache, one request at a time.

The lengths take turns (10, 50, ..., 1000, 10, ...), so a drift of the machine spreads over all of them.
"""

from collections.abc import Callable

from kvtuner_sglang.config import TtftConfig
from kvtuner_sglang.evidence.record import Metric, metric_key
from kvtuner_sglang.measure import validity
from kvtuner_sglang.measure.metrics import summarize
from kvtuner_sglang.measure.prompts import PromptSource
from kvtuner_sglang.measure.target import Target
from kvtuner_sglang.serving.client import Sample

OUTPUT_TOKENS = 2  # a second token shows that the first one did not wait for the end of the answer
MS_PER_S = 1000.0


def measure_ttft(target: Target, ttft: TtftConfig, prompts: PromptSource,
                 say: Callable[[str], None]) -> dict[str, Metric]:
    """Metrics ttft_ms/prompt_tokens=N; raises MeasurementInvalid, or RunFailed if a rank is gone."""
    planned = {tokens: prompts.take(ttft.repeats, tokens) for tokens in ttft.prompt_tokens}
    validity.require_unique([prompt for of_length in planned.values() for prompt in of_length])
    for tokens in ttft.prompt_tokens:
        warm_ups = target.send("ttft_warmup", prompts.take(ttft.warmup, tokens), OUTPUT_TOKENS, concurrency=1)
        validity.require_warm_up(warm_ups, tokens)
    target.flush_cache()
    samples: dict[int, list[Sample]] = {tokens: [] for tokens in ttft.prompt_tokens}
    for repeat in range(ttft.repeats):
        for tokens in ttft.prompt_tokens:
            sent = target.send("ttft", [planned[tokens][repeat]], OUTPUT_TOKENS, concurrency=1)
            validity.require_valid(sent)
            samples[tokens] += sent
        say(f"time to first token: round {repeat + 1} of {ttft.repeats}, {len(samples)} prompt lengths each")
    return {metric_key("ttft_ms", prompt_tokens=tokens): summarize([ttft_ms(s) for s in of_length], "ms")
            for tokens, of_length in samples.items()}


def ttft_ms(sample: Sample) -> float:
    """Milliseconds from sending the request to its first token; of a valid sample only."""
    if sample.first_token_s is None:
        raise ValueError(f"request {sample.request_id} has no first token")
    return (sample.first_token_s - sample.sent_s) * MS_PER_S
