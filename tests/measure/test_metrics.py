"""Summaries against numpy and by hand; prompts; the arithmetic of a closed loop."""

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.measure.metrics import summarize
from kvtuner_sglang.measure.prompts import PromptSource
from kvtuner_sglang.measure.throughput import dispatch_s, level_metrics, tpot_ms, wall_s
from kvtuner_sglang.measure.ttft import ttft_ms
from kvtuner_sglang.serving.client import Sample


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=60))
def test_summary_against_sorted_values(values: list[float]) -> None:
    metric = summarize(values, "ms")
    ordered = sorted(values)
    assert (metric.n, metric.unit, metric.min, metric.max) == (len(values), "ms", ordered[0], ordered[-1])
    assert metric.mean == pytest.approx(sum(values) / len(values))
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        place = share * (len(values) - 1)
        low = ordered[int(place)]
        high = ordered[min(int(place) + 1, len(values) - 1)]
        assert getattr(metric, name) == pytest.approx(low + (high - low) * (place - int(place)))
    assert metric.p50 <= metric.p90 <= metric.p99 <= metric.max


def test_summary_of_nothing_or_of_infinity() -> None:
    for values in ([], [1.0, float("inf")], [float("nan")]):
        with pytest.raises(ValueError, match="no summary"):
            summarize(values, "ms")


@given(st.integers(0, 2**32), st.lists(st.tuples(st.integers(1, 5), st.integers(1, 1000)), min_size=1, max_size=4))
def test_prompts_are_exact_and_share_no_beginning(seed: int, calls: list[tuple[int, int]]) -> None:
    source, again = PromptSource(5000, seed), PromptSource(5000, seed)
    prompts = []
    for count, tokens in calls:
        taken = source.take(count, tokens)
        assert taken == again.take(count, tokens)
        assert [len(prompt) for prompt in taken] == [tokens] * count
        prompts += taken
    first_ids = [prompt[0] for prompt in prompts]
    assert len(set(first_ids)) == len(first_ids)
    assert all(256 <= token < 4500 for prompt in prompts for token in prompt)
    json.dumps(prompts)


def test_prompts_differ_with_the_seed() -> None:
    assert PromptSource(5000, 0).take(3, 20) != PromptSource(5000, 1).take(3, 20)


def test_a_vocabulary_that_is_too_small() -> None:
    with pytest.raises(UserError, match="vocabulary of 300"):
        PromptSource(300, 0)
    source = PromptSource(1000, 0)
    with pytest.raises(UserError, match="fewer requests"):
        source.take(1000, 4)


def test_times_of_one_request(make_sample: Callable[..., Sample]) -> None:
    assert ttft_ms(make_sample()) == pytest.approx(200.0)
    assert tpot_ms(make_sample()) == pytest.approx(150.0)
    with pytest.raises(ValueError, match="no first token"):
        ttft_ms(make_sample(token_times_s=()))


def test_metrics_of_a_level(make_sample: Callable[..., Sample]) -> None:
    """Two workers, four requests from 1.0 s to 3.0 s; the second pair is sent 0.1 and 0.2 s after an answer."""
    spans = [(1.0, 1.6), (1.0, 1.8), (1.7, 2.5), (2.0, 3.0)]
    samples = [make_sample(sent_s=a, ended_s=b, token_times_s=(a + 0.2, a + 0.3, a + 0.5)) for a, b in spans]
    assert wall_s(samples) == pytest.approx(2.0)
    assert dispatch_s(samples, 2) == pytest.approx([0.1, 0.2])
    metrics = level_metrics(samples, 2)
    assert metrics["requests_per_s/concurrency=2"].mean == pytest.approx(2.0)
    assert metrics["output_tokens_per_s/concurrency=2"].mean == pytest.approx(6.0)
    assert metrics["latency_ms/concurrency=2"].mean == pytest.approx(np.mean([600, 800, 800, 1000]))
    assert metrics["tpot_ms/concurrency=2"].p50 == pytest.approx(150.0)


def test_one_output_token_has_no_tpot(make_sample: Callable[..., Sample]) -> None:
    sample = make_sample(output_tokens_asked=1, output_tokens=1, output_ids=[1], token_times_s=(1.2,))
    assert "tpot_ms/concurrency=1" not in level_metrics([sample], 1)
