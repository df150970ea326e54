"""A load's answers, too, are held to what the machine needs at least."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from kvtuner_sglang.config import RunConfig
from kvtuner_sglang.errors import MeasurementInvalid
from kvtuner_sglang.load import measure
from kvtuner_sglang.load.measure import Load
from kvtuner_sglang.load.plan import Level, Planner
from kvtuner_sglang.measure.hardware import Floor, Peak
from kvtuner_sglang.measure.prompts import PromptSource
from kvtuner_sglang.serving.client import Sample

# 1000 weights in layers, an embedding and an lm_head of 500 each; no attention to speak of
SMALL = SimpleNamespace(layers=1, q_heads=1, head_dim=0, hidden_size=5, vocab_size=100, parameters=2000)


def load(load_config: Callable[..., RunConfig], sample: Sample, bytes_per_s: float, flops_per_s: float) -> Load:
    config = load_config("workload=closed", "workload.requests=2", "workload.concurrency=[1]")
    planner = Planner(config.workload, PromptSource(49152, 0), 64)
    server = SimpleNamespace(base_url="", check=lambda: None)
    floor = Floor(Peak(bytes_per_s, flops_per_s, "a test"), SMALL, 4, 0.0)
    return Load(server, config, config.workload, planner, SimpleNamespace(send=lambda _batch: [sample]),
                lambda _line: None, floor)


@pytest.mark.parametrize(("flops_per_s", "cached", "counts"), [(2e5, 0, True), (1e5, 0, False), (1e5, 9, True)])
def test_a_first_token_before_its_prompt_can_be_computed(load_config, make_sample, monkeypatch, flops_per_s, cached,
                                                         counts):
    """10 tokens are 21,000 FLOPs: 105 ms or 210 ms, and the first came after 200; 9 cached ones are none."""
    monkeypatch.setattr(measure.client, "flush_cache", lambda _url: None)
    sample = make_sample(cached_tokens=cached, cached_tokens_planned=cached)
    one = load(load_config, sample, 1e9, flops_per_s)
    if counts:
        assert one.repeat(Level(concurrency=1), 0) == [sample]
    else:
        with pytest.raises(MeasurementInvalid, match=r"faster_than_floor: .* had its first token after 200"):
            one.repeat(Level(concurrency=1), 0)


def test_tokens_faster_than_the_weights_are_read(load_config, make_sample):
    """1500 weights of 4 bytes: 6 ms a token at 1e6 bytes/s, 300 at 2e4; the two tokens came 150 ms apart."""
    level, sample = Level(concurrency=1), make_sample()
    found = load(load_config, sample, 1e6, 1e9).metrics([[sample]] * 3, level)
    assert found["tpot_ms/concurrency=1"].p50 == pytest.approx(150)
    with pytest.raises(MeasurementInvalid, match="faster_than_floor: tpot_ms/concurrency=1 has a median of 150"):
        load(load_config, sample, 2e4, 1e9).metrics([[sample]] * 3, level)
