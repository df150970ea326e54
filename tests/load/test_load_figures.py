"""Metrics of a load by hand: latencies, goodput, intervals over repeats, bisection."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from kvtuner_sglang.config import RunConfig
from kvtuner_sglang.evidence.record import Metric
from kvtuner_sglang.load import measure
from kvtuner_sglang.load.config import Slo
from kvtuner_sglang.load.figures import attainment, e2e_ms, good, itl_ms, level_metrics, over_repeats
from kvtuner_sglang.load.measure import bisect_rates
from kvtuner_sglang.load.plan import Level
from kvtuner_sglang.serving.client import Sample


def test_gaps_between_tokens(make_sample: Callable[..., Sample]) -> None:
    assert itl_ms(make_sample()) == pytest.approx([100.0, 200.0])
    # Two tokens in one piece share the wait for it; the first piece's tokens waited for nothing.
    assert itl_ms(make_sample(token_times_s=(1.0, 1.0, 1.4, 1.4, 1.5))) == pytest.approx([200.0, 200.0, 100.0])
    assert e2e_ms(make_sample()) == pytest.approx(500.0)


@pytest.mark.parametrize(("ttft", "tpot", "kept"), [(200, 150, True), (199, 150, False), (200, 149, False)])
def test_both_bounds_of_the_slo_count(make_sample: Callable[..., Sample], ttft: float, tpot: float, kept: bool) -> None:
    sample = make_sample(sent_s=0.0, token_times_s=(0.2, 0.3, 0.5))
    assert good(sample, Slo(ttft, tpot)) is kept
    assert attainment([sample, make_sample(sent_s=-9.0)], Slo(ttft, tpot)) == (0.5 if kept else 0.0)


def test_students_interval_of_three_repeats() -> None:
    """1, 2, 3: mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.3027."""
    metric = over_repeats([1.0, 2.0, 3.0], "ms")
    assert (metric.n, metric.mean, metric.unit) == (3, 2.0, "ms")
    assert metric.ci95 == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
    assert "ci95" in metric.model_dump_json()
    assert "ci95" not in metric.model_copy(update={"ci95": None}).model_dump_json()


def test_metrics_of_three_repeats(make_sample: Callable[..., Sample]) -> None:
    """Two requests a repeat over 1 s, of which one is good; two ranks; in the last repeat one was retracted twice."""
    def repeat(retractions: int) -> list[Sample]:
        return [make_sample(sent_s=1.0, ended_s=2.0, cached_tokens=64, retractions=retractions),
                make_sample(sent_s=1.1, ended_s=1.9, token_times_s=(1.5, 1.6, 1.8))]

    metrics = level_metrics([repeat(0), repeat(0), repeat(2)], Slo(300, 200), 2, {"concurrency": 2})
    at = "concurrency=2"
    assert metrics[f"ttft_ms/{at}"].n == metrics[f"e2e_ms/{at}"].n == 6
    assert metrics[f"itl_ms/{at}"].n == 12
    assert metrics[f"ttft_ms/{at}"].mean == pytest.approx((200 + 400) / 2)
    assert metrics[f"output_tokens_per_s/{at}"].mean == pytest.approx(6.0)
    assert metrics[f"output_tokens_per_s_per_device/{at}"].mean == pytest.approx(3.0)
    assert metrics[f"requests_per_s/{at}"].mean == pytest.approx(2.0)
    assert metrics[f"goodput_per_s/{at}"].mean == pytest.approx(1.0)
    assert metrics[f"slo_share/{at}"].mean == 0.5
    assert metrics[f"cached_tokens/{at}"].mean == 32
    assert (metrics[f"retractions/{at}"].mean, metrics[f"retractions/{at}"].max) == (pytest.approx(2 / 3), 2)
    assert metrics[f"ttft_p50_ms/{at}"].ci95 == pytest.approx((300, 300))


def test_every_repeat_has_its_own_bisection(make_sample: Callable[..., Sample],
                                            load_config: Callable[..., RunConfig]) -> None:
    """Of 0.5, 0.7, 1, 1.4 and 2 req/s none is met in the first repeat, 0.7 in the second, all in the third."""
    within, asked = (0.0, 0.7, 2.0), []

    def repeat(level: Level, number: int) -> list[Sample]:
        asked.append((number, level.rate_per_s))
        late = (level.rate_per_s or 0) > within[number]
        return [make_sample(sent_s=-9.0 if late and n < 2 else 1.0) for n in range(10)]  # 80 % of 90 % needed

    tried: dict[float | None, int] = {}

    def metrics(repeats: list[list[Sample]], level: Level) -> dict[str, Metric]:
        tried[level.rate_per_s] = len(repeats)
        return {}

    load = SimpleNamespace(warm_up=lambda _level: None, repeat=repeat, metrics=metrics, say=lambda _line: None)
    config = load_config("workload=capacity", "workload.rates_per_s=[0.5,0.7,1.0,1.4,2.0]")
    found, warnings = measure.find_capacity(load, config.workload)
    assert asked == [(0, 1.0), (0, 0.5), (1, 1.0), (1, 0.5), (1, 0.7), (2, 1.0), (2, 1.4), (2, 2.0)]
    assert tried == {0.5: 2, 0.7: 1, 1.0: 3, 1.4: 1, 2.0: 1}
    capacity = found["capacity_per_s"]
    assert (capacity.n, capacity.mean, capacity.min, capacity.max) == (3, pytest.approx(0.9), 0.0, 2.0)
    assert capacity.ci95 == pytest.approx((0.9 - 2.5212, 0.9 + 2.5212), abs=0.001)
    assert [words in warning for words, warning in zip(("In 1 of 3 repeats not even the lowest rate, 0.5",
                                                        "In 1 of 3 repeats the highest rate of the list, 2"),
                                                       warnings, strict=True)] == [True, True]


@pytest.mark.parametrize("highest", range(6))
def test_bisection_finds_the_highest_rate(highest: int) -> None:
    rates = (0.5, 1.0, 2.0, 4.0, 8.0)
    asked: list[float] = []

    def meets(rate: float) -> bool:
        asked.append(rate)
        return rate in rates[:highest]

    assert bisect_rates(rates, meets) == (rates[highest - 1] if highest else 0.0)
    assert len(asked) <= 3
    assert len(set(asked)) == len(asked)
