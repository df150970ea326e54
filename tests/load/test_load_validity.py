"""A load that was not the one it claims to be does not count."""

from collections.abc import Callable

import pytest

from kvtuner_sglang.config import RunConfig
from kvtuner_sglang.errors import ConfigError, MeasurementInvalid
from kvtuner_sglang.load import validity
from kvtuner_sglang.load.plan import Planner
from kvtuner_sglang.measure.prompts import PromptSource
from kvtuner_sglang.measure.validity import require_valid
from kvtuner_sglang.serving.client import Sample


def test_late_requests_are_no_open_loop(make_sample: Callable[..., Sample]) -> None:
    on_time = [make_sample(sent_s=1.01, scheduled_s=1.0) for _ in range(50)]
    validity.require_on_schedule(on_time, 20.0)
    assert validity.dispatch_lag_ms(on_time) == pytest.approx([10.0] * 50)
    with pytest.raises(MeasurementInvalid, match=r"on_schedule: .*max_dispatch_lag_ms=20"):
        validity.require_on_schedule([*on_time, make_sample(sent_s=1.1, scheduled_s=1.0)], 20.0)
    with pytest.raises(MeasurementInvalid, match="1 of 51 requests"):
        validity.require_on_schedule([*on_time, make_sample()], 20.0)


def test_requests_sent_all_at_once_are_no_open_loop(make_sample: Callable[..., Sample]) -> None:
    validity.require_on_schedule([make_sample(sent_s=0.991 + n, scheduled_s=1.0 + n) for n in range(4)], 20.0)
    with pytest.raises(MeasurementInvalid, match=r"on_schedule: a request left 750\.0 ms before its schedule"):
        validity.require_on_schedule([make_sample(sent_s=1.0, scheduled_s=1.0 + n / 4) for n in range(4)], 20.0)


def test_cached_tokens_are_those_planned(make_sample: Callable[..., Sample]) -> None:
    require_valid([make_sample(cached_tokens=8, cached_tokens_planned=8)])
    for cached, planned in ((0, 8), (16, 8), (8, 0), (None, 8)):
        with pytest.raises(MeasurementInvalid, match=f"{cached} prompt tokens .* {planned} were planned"):
            require_valid([make_sample(cached_tokens=cached, cached_tokens_planned=planned)])


def test_retractions_that_nobody_counted_are_not_none(make_sample: Callable[..., Sample]) -> None:
    validity.require_retractions_reported([make_sample(retractions=0), make_sample(retractions=2)])
    with pytest.raises(MeasurementInvalid, match="retractions_reported: of 1 of 2 requests"):
        validity.require_retractions_reported([make_sample(), make_sample(retractions=None)])


def test_prompts_may_share_only_what_is_planned(load_config: Callable[..., RunConfig]) -> None:
    shared = load_config("workload=closed", "workload.cache=shared_prefix", "workload.shared_tokens=64").workload
    drawn = Planner(shared, PromptSource(49152, 0), 64).draw("a")
    validity.require_unique(drawn.measured, shared)
    with pytest.raises(MeasurementInvalid, match="unique_prompts"):
        validity.require_unique(drawn.measured, load_config("workload=closed").workload)
    with pytest.raises(MeasurementInvalid, match="unique_prompts"):
        validity.require_unique([*drawn.measured, drawn.measured[0]], shared)


def test_missing_turns(make_sample: Callable[..., Sample], load_config: Callable[..., RunConfig]) -> None:
    workload = load_config("workload=multiturn").workload
    validity.require_turns([make_sample()] * 6, workload)
    with pytest.raises(MeasurementInvalid, match="5 of 6 turns"):
        validity.require_turns([make_sample()] * 5, workload)


@pytest.mark.parametrize(("name", "rule", "not_rule"), [
    ("closed", "fast_client", "on_schedule"), ("multiturn", "fast_client", "on_schedule"),
    ("open", "on_schedule", "fast_client"), ("capacity", "on_schedule", "fast_client")])
def test_a_record_names_the_rules_of_its_loop(load_config: Callable[..., RunConfig], name: str, rule: str,
                                              not_rule: str) -> None:
    names = {sentence.partition(": ")[0] for sentence in validity.rules_held(load_config(f"workload={name}").workload)}
    assert {"http_200", "cold_cache", "unique_prompts", "warm_up", "same_server", "retractions_reported", rule} <= names
    assert not_rule not in names


@pytest.mark.parametrize(("words", "part"), [
    (["workload=closed", "workload.repeats=2"], "workload.repeats=2 cannot be used"),
    (["workload=closed", "workload.requests=7"], "less than 2 for each of 4 workers"),
    (["workload=multiturn", "workload.conversations=1"], "never reach concurrency 2"),
    (["workload=open", "+workload.concurrency=[1]"], "no such option exists"),
    (["workload=closed", "workload.shared_tokens=64"], "only then"),
    (["workload=closed", "workload.cache=shared_prefix"], "only then"),
    (["workload=closed", "workload.cache=shared_prefix", "workload.shared_tokens=160"], "leaves nothing"),
    (["workload=closed", "workload.cache=shared_prefix", "workload.shared_tokens=63"], "less than a page of 64"),
    (["workload=closed", "workload.cache=warm", "workload.prompt_tokens=64"], "less than a page of 64"),
    (["workload=capacity", "workload.rates_per_s=[2,1]"], "ascending"),
    (["workload=closed", "workload.output_tokens=1"], "workload.output_tokens"),
    (["workload=longctx", "workload.prompt_tokens=2030"], "server.context_length"),
    (["workload=closed", "workload.kind=ajar"], "workload"),
])
def test_loads_that_make_no_sense_are_one_sentence(load_config: Callable[..., RunConfig], words: list[str],
                                                   part: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(*words)
    assert part in str(refused.value)
    assert "\n" not in str(refused.value)
