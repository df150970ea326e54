"""From two times to a rate, and what no time can be."""

import pytest

from kvtuner_sglang.errors import MeasurementInvalid
from kvtuner_sglang.measure.hardware import PEAKS, Floor, peak_of
from kvtuner_sglang.serving.checkpoint import prepare_checkpoint
from kvtuner_sglang.speed.figures import decode_metrics, decode_rates, ttft_metrics

NO_FLOOR = Floor(None, prepare_checkpoint("dummy:qwen2_5_7b", None), 2, 57344)
H100 = Floor(peak_of("NVIDIA H100 80GB HBM3"), NO_FLOOR.checkpoint, 2, 57344)


def rounds(make_call, first, second, **changes):
    calls = []
    for number, (short, long) in enumerate(zip(first, second, strict=True)):
        calls += [make_call(round=number, new_tokens=8, seconds=short, **changes),
                  make_call(round=number, new_tokens=24, seconds=long, **changes)]
    return calls


def test_what_both_times_have_cancels():
    # 4 requests, 16 tokens more each, at 20 ms a step: 0.32 s, whatever came before
    for overhead in (0.0, 3.0):
        rates = decode_rates(4, (8, 24), [overhead + 0.16], [overhead + 0.48])
        assert rates == pytest.approx([200.0])


def test_every_round_is_kept_and_the_median_reported(make_call):
    calls = rounds(make_call, [1.0, 1.0, 1.0], [1.32, 1.64, 1.16])
    calls += [make_call(kind="warmup", new_tokens=24, seconds=9.0), make_call(kind="fill", new_tokens=1)]
    metrics = decode_metrics(calls, (8, 24), NO_FLOOR)
    rate, tpot = metrics["decode_tok_s/batch=4/context=128"], metrics["tpot_ms/batch=4/context=128"]
    assert (rate.n, tpot.n) == (3, 3)
    assert (rate.p50, rate.min, rate.max) == pytest.approx((200.0, 100.0, 400.0))
    assert tpot.p50 == pytest.approx(20.0)
    full = decode_metrics(rounds(make_call, [1.0], [1.32], workload="saturation"), (8, 24), NO_FLOOR)
    assert set(full) == {"saturation_decode_tok_s/batch=4/context=128", "saturation_tpot_ms/batch=4/context=128"}


def test_longer_answers_that_took_no_longer_do_not_count(make_call):
    with pytest.raises(MeasurementInvalid, match="longer_takes_longer: in round 1 of 4 x 128"):
        decode_metrics(rounds(make_call, [1.0, 1.0], [1.1, 1.0]), (8, 24), NO_FLOOR)


def test_a_step_below_the_memory_floor_does_not_count(make_call):
    # 7.07e9 weights of two bytes at 3.35 TB/s
    assert H100.decode_step_ms(1, 0) == pytest.approx(4.22, abs=0.01)
    calls = rounds(make_call, [1.0], [1.0 + 16 * 0.004])
    with pytest.raises(MeasurementInvalid, match="faster_than_floor: a step of 4 x 128"):
        decode_metrics(calls, (8, 24), H100)
    assert decode_metrics(rounds(make_call, [1.0], [1.0 + 16 * 0.006]), (8, 24), H100)


def test_a_prefill_below_the_arithmetic_floor_does_not_count(make_call):
    assert 12 < H100.prefill_ms(0, 1000) < 15
    assert H100.prefill_ms(16384, 512) > H100.prefill_ms(0, 512)
    at = {"workload": "ttft", "context": 1000, "cached": 0, "new_tokens": 1}
    with pytest.raises(MeasurementInvalid, match="faster_than_floor: 1000 tokens"):
        ttft_metrics([make_call(seconds=0.010, **at)], H100)
    assert ttft_metrics([make_call(seconds=0.030, **at)], H100)["ttft_ms/prompt_tokens=1000"].p50 == 30
    cached = make_call(workload="ttft_cached", context=16896, cached=16384, new_tokens=1, seconds=0.03)
    assert set(ttft_metrics([cached], NO_FLOOR)) == {"ttft_cached_ms/cached=16384/new=512"}


def test_a_card_is_told_by_its_name():
    assert peak_of("NVIDIA H100 PCIe") == PEAKS["H100 PCIe"]
    assert peak_of("NVIDIA H200") == PEAKS["H200"]
    assert peak_of("Some other card") is None
    assert peak_of(None) is None
