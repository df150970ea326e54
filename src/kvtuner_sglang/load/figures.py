"""Samples of a load -> metrics: latencies over all requests, rates per repeat with an interval over the repeats."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from kvtuner_sglang.evidence.record import Metric, metric_key
from kvtuner_sglang.load.config import Slo
from kvtuner_sglang.measure.metrics import summarize
from kvtuner_sglang.measure.throughput import tpot_ms, wall_s
from kvtuner_sglang.measure.ttft import ttft_ms
from kvtuner_sglang.serving.client import Sample

MS_PER_S = 1000.0
CONFIDENCE = 0.95
Repeats = Sequence[Sequence[Sample]]  # the samples of each repeat


def itl_ms(sample: Sample) -> list[float]:
    """Gaps between tokens; what came in one piece shares the wait for it, as SGLang's bench_serving counts."""
    arrivals, counts = np.unique(sample.token_times_s, return_counts=True)
    gaps = np.diff(arrivals) * MS_PER_S
    return np.repeat(gaps / counts[1:], counts[1:]).tolist()


def e2e_ms(sample: Sample) -> float:
    """From sending the request to its last token."""
    return (sample.token_times_s[-1] - sample.sent_s) * MS_PER_S


def good(sample: Sample, slo: Slo) -> bool:
    """Whether a request kept both bounds."""
    return ttft_ms(sample) <= slo.ttft_ms and tpot_ms(sample) <= slo.tpot_ms


def attainment(samples: Sequence[Sample], slo: Slo) -> float:
    """Share of the requests that kept both bounds."""
    return sum(good(sample, slo) for sample in samples) / len(samples)


def over_repeats(values: Sequence[float], unit: str) -> Metric:
    """One value per repeat, with Student's 95 % interval of their mean (n - 1 degrees of freedom), if there are two."""
    if len(values) == 1:
        return summarize(values, unit)
    error = stats.sem(values) * stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    mean = float(np.mean(values))
    return summarize(values, unit).model_copy(update={"ci95": (mean - float(error), mean + float(error))})


def latencies(samples: Sequence[Sample], at: dict[str, float]) -> dict[str, Metric]:
    """Distributions over requests (gaps, of itl_ms)."""
    values = {
        "ttft_ms": [ttft_ms(s) for s in samples],
        "tpot_ms": [tpot_ms(s) for s in samples],
        "itl_ms": [gap for s in samples for gap in itl_ms(s)],
        "e2e_ms": [e2e_ms(s) for s in samples],
    }
    return {metric_key(name, **at): summarize(numbers, "ms") for name, numbers in values.items()}


def level_metrics(repeats: Repeats, slo: Slo, devices: int, at: dict[str, float]) -> dict[str, Metric]:
    """Metrics of one level, keyed by `at`; `devices` is the number of ranks, each of which has one.

    goodput_per_s: requests a second that kept the SLO.  ttft_p50_ms, tpot_p50_ms: each repeat's median, for their
    interval.  cached_tokens: per request, by the server's count.
    """
    def tokens_per_s(samples: Sequence[Sample]) -> float:
        return sum(s.stream_tokens for s in samples) / wall_s(samples)

    per_repeat: dict[str, tuple[str, Callable[[Sequence[Sample]], float]]] = {
        "requests_per_s": ("req/s", lambda r: len(r) / wall_s(r)),
        "output_tokens_per_s": ("tok/s", tokens_per_s),
        "output_tokens_per_s_per_device": ("tok/s", lambda r: tokens_per_s(r) / devices),
        "goodput_per_s": ("req/s", lambda r: sum(good(s, slo) for s in r) / wall_s(r)),
        "slo_share": ("ratio", lambda r: attainment(r, slo)),
        "ttft_p50_ms": ("ms", lambda r: float(np.median([ttft_ms(s) for s in r]))),
        "tpot_p50_ms": ("ms", lambda r: float(np.median([tpot_ms(s) for s in r]))),
        "cached_tokens": ("tokens", lambda r: float(np.mean([_counted(s.cached_tokens) for s in r]))),
        "retractions": ("requests", lambda r: float(sum(_counted(s.retractions) for s in r))),
    }
    together = [sample for samples in repeats for sample in samples]
    return latencies(together, at) | {
        metric_key(name, **at): over_repeats([value(samples) for samples in repeats], unit)
        for name, (unit, value) in per_repeat.items()
    }


def _counted(count: int | None) -> int:
    """What the server counted; a valid sample has it."""
    if count is None:
        raise ValueError("a sample without the server's count is not valid")
    return count
