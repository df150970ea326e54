"""Each rule is fed a violation of its own, and names itself in the reason."""

from collections.abc import Callable
from typing import Any

import pytest

from kvtuner_sglang.errors import MeasurementInvalid
from kvtuner_sglang.measure import validity
from kvtuner_sglang.serving.client import Sample

VIOLATIONS: list[tuple[str, dict[str, Any]]] = [
    ("http_200", {"http_status": 404, "text": '{"detail":"Not Found"}'}),
    ("http_200", {"http_status": None, "error": "connection refused"}),
    ("no_error", {"error": "the stream says: out of memory"}),
    ("prompt_tokens_as_sent", {"prompt_tokens": 9}),
    ("prompt_tokens_as_sent", {"prompt_tokens": None}),
    ("output_tokens_by_meta", {"output_tokens": 2}),
    ("output_tokens_by_meta", {"output_tokens": None}),
    ("output_tokens_by_stream", {"token_times_s": (1.2, 1.3)}),
    ("text_not_empty", {"text": ""}),
    ("times_in_order", {"token_times_s": (1.0, 1.3, 1.5)}),
    ("times_in_order", {"token_times_s": (1.3, 1.2, 1.5)}),
    ("times_in_order", {"ended_s": None}),
    ("cold_cache", {"cached_tokens": 1}),
    ("cold_cache", {"cached_tokens": None}),
]


@pytest.mark.parametrize(("rule", "changed"), VIOLATIONS)
def test_a_request_that_breaks_one_rule(make_sample: Callable[..., Sample], rule: str, changed: dict[str, Any]) -> None:
    assert validity.violation(make_sample()) is None
    assert (validity.violation(make_sample(**changed)) or "").startswith(f"{rule}: ")
    with pytest.raises(MeasurementInvalid, match=rf"ttft-7 .*{rule}: .*1 of 2 requests"):
        validity.require_valid([make_sample(), make_sample(**changed)])


def test_every_sample_rule_is_fed_a_violation() -> None:
    assert {rule.__name__ for rule in validity.SAMPLE_RULES} == {rule for rule, _ in VIOLATIONS}


def test_prompts_that_share_a_beginning() -> None:
    validity.require_unique([[1, 9], [2, 9]])
    with pytest.raises(MeasurementInvalid, match="unique_prompts"):
        validity.require_unique([[1, 8], [1, 9]])


def test_warm_up_of_another_length_or_failed(make_sample: Callable[..., Sample]) -> None:
    validity.require_warm_up([make_sample()], 10)
    with pytest.raises(MeasurementInvalid, match="warm_up"):
        validity.require_warm_up([], 10)
    with pytest.raises(MeasurementInvalid, match="warm_up"):
        validity.require_warm_up([make_sample()], 50)
    with pytest.raises(MeasurementInvalid, match="http_200"):
        validity.require_warm_up([make_sample(http_status=503)], 10)


def test_a_single_burst_is_no_closed_loop() -> None:
    validity.require_enough_requests(16, [1, 8])
    with pytest.raises(MeasurementInvalid, match="enough_requests"):
        validity.require_enough_requests(15, [1, 8])


def test_a_client_that_idles() -> None:
    validity.require_fast_client([0.1, 0.1], wall_s=10.0, concurrency=2)
    with pytest.raises(MeasurementInvalid, match=r"fast_client.*20%"):
        validity.require_fast_client([2.0, 2.0], wall_s=10.0, concurrency=2)


def info(**changed: Any) -> dict[str, Any]:
    kvtuner = {"plan_hash": "0123", "enabled": True, "ranks": [{"host": "a", "pid": 1}],
               "measurement": {"kv_noise": 0.0, "logits_dir": None}}
    top = {"startup_time": 12.5}
    return {**top, **{k: v for k, v in changed.items() if k in top},
            "kvtuner": {**kvtuner, **{k: v for k, v in changed.items() if k in kvtuner}}}


@pytest.mark.parametrize("changed", [{"startup_time": 13.0}, {"plan_hash": "4567"}, {"enabled": False},
                                     {"ranks": [{"host": "a", "pid": 2}]}])
def test_another_server_at_the_end(changed: dict[str, Any]) -> None:
    validity.require_same_server(info(), info())
    with pytest.raises(MeasurementInvalid, match="same_server"):
        validity.require_same_server(info(), info(**changed))


@pytest.mark.parametrize("flags", [{"kv_noise": 1e-6, "logits_dir": None}, {"kv_noise": 0.0, "logits_dir": "x"}])
def test_measurement_only_flags(flags: dict[str, Any]) -> None:
    validity.require_plain_server(info())
    with pytest.raises(MeasurementInvalid, match="plain_server"):
        validity.require_plain_server(info(measurement=flags))


def test_a_longer_prompt_that_is_faster_is_a_warning() -> None:
    assert validity.monotone_warnings({10: 100.0, 100: 95.0, 1000: 500.0}) == []
    [warning] = validity.monotone_warnings({1000: 20.0, 10: 100.0})
    assert "1000 tokens (20.0 ms)" in warning


def test_every_rule_of_a_run_has_its_sentence() -> None:
    sentences = validity.rules_held()
    assert len(sentences) == len(validity.SAMPLE_RULES) + len(validity.RUN_RULES)
    assert all(sentence.endswith(".") and len(sentence.split(": ", 1)[1]) > 10 for sentence in sentences)
