"""Throughput and latency under a closed loop of N workers, each sending its next request when its last is answered.

Why not the client of SGLang's own `sglang.benchmark.serving` (0.5.17): its details hold no HTTP status; it presets
output_len to the length asked for and overwrites it only when text arrives, so an empty or erroneous 200 stream counts
as a success with all its tokens (`async_request_sglang_generate`); and its prompts are runs of consecutive ids that
repeat with the seed.  Success here is counted by HTTP status and by tokens, per request.  The load workloads take its
arrivals, with our client in the place of its own: see load/bench_serving.py.
"""

from collections.abc import Callable, Sequence

from kvtuner_sglang.config import ThroughputConfig
from kvtuner_sglang.evidence.record import Metric, metric_key
from kvtuner_sglang.measure import validity
from kvtuner_sglang.measure.metrics import summarize
from kvtuner_sglang.measure.prompts import PromptSource
from kvtuner_sglang.measure.target import Target
from kvtuner_sglang.measure.ttft import MS_PER_S, ttft_ms
from kvtuner_sglang.serving.client import Sample


def measure_throughput(target: Target, load: ThroughputConfig, prompts: PromptSource,
                       say: Callable[[str], None]) -> dict[str, Metric]:
    """Metrics at each concurrency, as `level_metrics` names them; raises MeasurementInvalid or RunFailed."""
    metrics: dict[str, Metric] = {}
    for concurrency in load.concurrency:
        # One warm-up request per worker, all at once: the batch size that is measured next has then run before.
        warm_ups = target.send(f"throughput_warmup_c{concurrency}", prompts.take(concurrency, load.prompt_tokens),
                               load.output_tokens, concurrency)
        validity.require_warm_up(warm_ups, load.prompt_tokens)
        target.flush_cache()
        planned = prompts.take(load.requests_at(concurrency), load.prompt_tokens)
        validity.require_unique(planned)
        samples = target.send(f"throughput_c{concurrency}", planned, load.output_tokens, concurrency)
        validity.require_valid(samples)
        validity.require_fast_client(dispatch_s(samples, concurrency), wall_s(samples), concurrency)
        metrics |= level_metrics(samples, concurrency)
        rate = metrics[metric_key("output_tokens_per_s", concurrency=concurrency)].mean
        say(f"concurrency {concurrency}: {len(planned)} requests in {wall_s(samples):.1f} s, "
            f"{rate:.1f} output tokens/s")
    return metrics


def level_metrics(samples: Sequence[Sample], concurrency: int) -> dict[str, Metric]:
    """Metrics of one level, keyed .../concurrency=N.

    samples: valid ones (validity.require_valid).  requests_per_s and output_tokens_per_s are one value each;
    latency_ms, loaded_ttft_ms and tpot_ms (time per output token after the first) have one per request.
    """
    seconds = wall_s(samples)
    values = {
        "requests_per_s": ([len(samples) / seconds], "req/s"),
        "output_tokens_per_s": ([sum(s.stream_tokens for s in samples) / seconds], "tok/s"),
        "latency_ms": ([(_ended_s(s) - s.sent_s) * MS_PER_S for s in samples], "ms"),
        "loaded_ttft_ms": ([ttft_ms(s) for s in samples], "ms"),
        "tpot_ms": ([tpot_ms(s) for s in samples if s.stream_tokens > 1], "ms"),
    }
    return {metric_key(name, concurrency=concurrency): summarize(numbers, unit)
            for name, (numbers, unit) in values.items() if numbers}


def tpot_ms(sample: Sample) -> float:
    """Milliseconds per output token after the first; needs two."""
    return (sample.token_times_s[-1] - sample.token_times_s[0]) * MS_PER_S / (sample.stream_tokens - 1)


def wall_s(samples: Sequence[Sample]) -> float:
    """Seconds from the first request sent to the last answer ended."""
    return max(_ended_s(s) for s in samples) - min(s.sent_s for s in samples)


def dispatch_s(samples: Sequence[Sample], concurrency: int) -> list[float]:
    """Seconds between the end of an answer and the request that its worker then sent.

    In a closed loop the i-th answer to end frees the worker that sends request `concurrency` + i.
    """
    sent = sorted(s.sent_s for s in samples)
    ended = sorted(_ended_s(s) for s in samples)
    return [after - before for before, after in zip(ended, sent[concurrency:], strict=False)]


def _ended_s(sample: Sample) -> float:
    if sample.ended_s is None:
        raise ValueError(f"request {sample.request_id} has not ended")
    return sample.ended_s
