"""Differences by hand, and what stays within a floor."""

import numpy as np
import pytest

from kvtuner_sglang.agreement.answers import Answer, read_answer
from kvtuner_sglang.agreement.compare import enough, moved, texts_equal, within
from kvtuner_sglang.agreement.figures import FLOOR, figures, rows, table
from kvtuner_sglang.errors import MeasurementInvalid
from kvtuner_sglang.evidence.record import KVRecord
from kvtuner_sglang.measure.metrics import summarize

NO_KV = KVRecord.model_construct()


def answer(tokens: list[int], *values: float) -> Answer:
    return Answer(tokens, list(values), 0, 0)


ONE = [answer([1, 2, 3], -1.0, -2.0, -3.0), answer([4, 5, 6], -1.0, -1.0, -1.0)]


def test_only_tokens_before_the_first_other_one_are_compared():
    other = [answer([1, 2, 9], -1.5, -2.0, -9.0), answer([4, 5, 6], -1.0, -1.25, -1.0)]
    np.testing.assert_allclose(moved(ONE, other), [0.5, 0.0, 0.0, 0.25, 0.0])
    assert texts_equal(ONE, other) == 1
    assert enough(moved(ONE, other), ONE)


def test_a_token_behind_another_one_does_not_count_though_it_is_equal_again():
    assert len(moved(ONE[:1], [answer([9, 2, 3], -1.0, -2.0, -3.0)])) == 0


def test_a_quarter_of_all_tokens_is_too_few():
    assert not enough(np.zeros(3), [answer([0] * 12)])
    assert enough(np.zeros(4), [answer([0] * 12)])


@pytest.mark.parametrize(("values", "floor", "equal", "is_within"), [
    ([0.2, 0.2], [0.1, 0.1], 0, True),
    ([0.3, 0.2], [0.1, 0.2], 0, True),
    ([0.0, 0.0, 0.5], [0.1, 0.2], 2, False),  # the maximum
    ([0.3, 0.3], [0.1, 0.2, 0.0, 0.0], 2, False),  # the mean
    ([0.3], None, 2, True),
    ([0.0], None, 1, False),
])
def test_within_twice_the_floor_or_without_one_all_texts_equal(values, floor, equal, is_within):
    noise = summarize(floor, "nat") if floor else None
    assert within(summarize(values, "nat"), noise, equal, 2) is is_within


def test_figures_of_a_quantized_and_of_a_plain_run():
    near = [answer([1, 2, 3], -1.1, -2.0, -3.0), ONE[1]]
    far = [answer([1, 2, 3], -1.9, -2.0, -3.0), answer([4, 5, 7], -1.0, -1.0, -1.0)]
    quantized = figures(ONE, {FLOOR: near, "tp2": near, "pp2": far}, NO_KV)
    assert [(r["dist"], r["within"], r["texts_equal"], r["tokens"]) for r in rows(quantized.metrics)] == [
        ("tp2", True, 2, 6), ("pp2", False, 1, 5)]
    first = rows(quantized.metrics)[0]
    assert first["floor_max"] == first["max"] == pytest.approx(0.1)
    assert first["mean"] == pytest.approx(0.1 / 6)
    assert "NOT within" in table(quantized)[1]
    plain = figures(ONE, {"tp2": near, "pp2": far}, NO_KV)
    assert [(r["within"], r["floor_mean"]) for r in rows(plain.metrics)] == [(True, None), (False, None)]


def test_texts_without_a_common_token_are_no_measurement():
    with pytest.raises(MeasurementInvalid, match="no token in common"):
        figures(ONE, {"tp2": [answer([0, 2, 3], 0, 0, 0), answer([0, 5, 6], 0, 0, 0)]}, NO_KV)


def test_few_common_tokens_are_a_warning():
    odd = figures(ONE, {"tp2": [answer([1, 0, 3], 0, 0, 0), answer([0, 5, 6], 0, 0, 0)]}, NO_KV)
    assert "only 1 tokens" in odd.warnings[0]


def reply(**changes):
    meta = {"prompt_tokens": 5, "completion_tokens": 2, "cached_tokens": 0, "num_retractions": 0,
            "output_token_logprobs": [[-1.0, 7, None], [-2.0, 8, None]]}
    return {"output_ids": [7, 8], "meta_info": {**meta, **changes}}


def test_a_whole_answer_is_read():
    assert read_answer(reply(), 5, 2, True) == answer([7, 8], -1.0, -2.0)


@pytest.mark.parametrize(("changes", "rule"), [
    ({"completion_tokens": 3}, "tokens_as_asked"),
    ({"prompt_tokens": 4}, "tokens_as_asked"),
    ({"output_token_logprobs": [[-1.0, 7, None]]}, "tokens_as_asked"),
    ({"output_token_logprobs": [[-1.0, 7, None], [float("nan"), 8, None]]}, "finite"),
    ({"output_token_logprobs": [[-1.0, 7, None], [None, 8, None]]}, "finite"),
])
def test_an_answer_that_is_not_whole_is_refused(changes, rule):
    with pytest.raises(MeasurementInvalid, match=rule):
        read_answer(reply(**changes), 5, 2, True)


def test_an_answer_without_its_retractions_is_refused():
    silent = reply()
    del silent["meta_info"]["num_retractions"]
    with pytest.raises(MeasurementInvalid, match="retractions_reported"):
        read_answer(silent, 5, 2, True)
