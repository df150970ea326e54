"""Every load workload against real servers: cached tokens are those planned, lateness and retractions are seen."""

from pathlib import Path

import pytest

from kvtuner_sglang import command_line
from kvtuner_sglang.errors import MeasurementInvalid
from kvtuner_sglang.evidence.environment import collect_environment
from kvtuner_sglang.load import measure
from kvtuner_sglang.load.measure import run_load
from kvtuner_sglang.measure.physics import floor_of_run
from kvtuner_sglang.measure.prompts import PromptSource
from kvtuner_sglang.serving.checkpoint import prepare_checkpoint
from kvtuner_sglang.serving.cluster import running_cluster

CONF = Path(__file__).parents[2] / "conf"
pytestmark = pytest.mark.slow
SMALL = ["workload.requests=4", "workload.prompt_tokens=80", "workload.output_tokens=3"]
ANY_SPEED = ["workload.slo.ttft_ms=1e9", "workload.slo.tpot_ms=1e9"]
TALK = ["workload=multiturn", "workload.concurrency=[2]", "workload.shared_tokens=70", "workload.user_tokens=30",
        "workload.turns=3", "workload.output_tokens=3"]


@pytest.fixture
def load(tmp_path):
    """load(cluster, "workload=...", ...) -> figures and samples of run_load."""

    def run(cluster, *words):
        config = command_line.load([*words, f"runs_dir={tmp_path}", "server.request_timeout_s=3600"], CONF)
        checkpoint = prepare_checkpoint(config.model.source, config.model.path)
        floor = floor_of_run(config, checkpoint, collect_environment().machine, lambda _line: None)
        samples = []
        return run_load(cluster, config, checkpoint, lambda _line: None, samples.append, floor), samples

    return run


@pytest.mark.parametrize(("cache", "cached"), [("cold", 0), ("warm", 64), ("shared_prefix", 64)])
def test_closed_loops_by_their_cache_protocol(kv4_server, load, cache, cached):
    more = ["workload.shared_tokens=70"] if cache == "shared_prefix" else []
    figures, samples = load(kv4_server, "workload=closed", "workload.concurrency=[2]", f"workload.cache={cache}",
                            *more, *SMALL, *ANY_SPEED)
    measured = [s for s in samples if s.kind.startswith("closed_c2")]
    assert len(measured) == 12
    assert {(s.cached_tokens, s.cached_tokens_planned) for s in measured} == {(cached, cached)}
    assert figures.metrics["cached_tokens/concurrency=2"].mean == cached
    assert figures.metrics["ttft_ms/concurrency=2"].n == 12
    assert figures.metrics["goodput_per_s/concurrency=2"].ci95 is not None
    assert figures.metrics["slo_share/concurrency=2"].mean == 1.0


def test_conversations_find_what_was_said(kv4_server, load):
    """Pages of 64: 70 shared tokens are one; 70 + 30 + 3 - 1 are one; 70 + 2 * 33 - 1 are two."""
    figures, samples = load(kv4_server, *TALK, *ANY_SPEED)
    turns = [[s.cached_tokens for s in samples if s.kind == "multiturn_c2_r2" and s.request_id.endswith(f"turn{n}")]
             for n in range(3)]
    assert turns == [[64, 64], [64, 64], [128, 128]]
    assert figures.metrics["ttft_ms/concurrency=2/turn=3"].n == 6
    assert figures.metrics["cached_tokens/concurrency=2/turn=3"].mean == 128


def test_an_open_loop_is_on_schedule_or_does_not_count(kv4_server, load):
    words = ["workload=open", "workload.rates_per_s=[2]", *SMALL, *ANY_SPEED]
    figures, samples = load(kv4_server, *words, "workload.max_dispatch_lag_ms=1e9")
    assert figures.metrics["dispatch_lag_ms/rate_per_s=2.0"].n == 12
    assert len({s.scheduled_s for s in samples if s.kind.startswith("open_q2_r")}) == 12
    with pytest.raises(MeasurementInvalid, match="on_schedule"):
        load(kv4_server, *words, "workload.max_dispatch_lag_ms=1e-9")


def test_a_cache_that_is_not_as_planned_does_not_count(kv4_server, load, monkeypatch):
    """The same prompts again, without the flush in between."""
    class SamePrompts(measure.Planner):
        def draw(self, kind):
            self.prompts = PromptSource(49152, 7)
            return super().draw(kind)

    monkeypatch.setattr(measure, "Planner", SamePrompts)
    monkeypatch.setattr(measure.client, "flush_cache", lambda _url: None)
    with pytest.raises(MeasurementInvalid, match="cold_cache: 64 prompt tokens came from the prefix cache, 0 were"):
        load(kv4_server, "workload=closed", "workload.concurrency=[1]", *SMALL)


@pytest.fixture(scope="module")
def narrow(tiny_model):
    """A tiny model in full precision with room for 141 tokens, for requests of 8 + 48.

    SGLang lets a third one in beside two that run (8 + 48 fit beside what it expects of them, 16 + 0.7 * 96), and
    three do not fit to their end.
    """
    bytes_per_token = 2 * 2 * 2 * 32 * 4  # layers, K and V, heads, channels, float32
    return ["exp=capacity", "quant=bf16", "model=local", f"model.path={tiny_model}", "server.context_length=256",
            f"server.kv_gib={142 * bytes_per_token / 2**30}"]


@pytest.fixture(scope="module")
def narrow_server(narrow, tiny_model, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    config = command_line.load([*narrow, f"runs_dir={runs}"], CONF)
    with running_cluster(config, prepare_checkpoint("path", str(tiny_model)), runs / "narrow",
                         lambda line: None) as cluster:
        yield cluster


@pytest.mark.parametrize(("bound", "capacity", "warning"), [(1e9, 200.0, "more may be possible"),
                                                            (1e-3, 0.0, "In 3 of 3 repeats not even the lowest")])
def test_capacity_is_the_highest_rate_within_the_slo(narrow, narrow_server, load, bound, capacity, warning):
    """Whatever the machine's speed: without a bound every rate keeps it, below a microsecond none does."""
    figures, samples = load(
        narrow_server, *narrow, "workload.rates_per_s=[50,200]", "workload.requests=4", "workload.prompt_tokens=8",
        "workload.output_tokens=48", "workload.max_dispatch_lag_ms=1e9", f"workload.slo.ttft_ms={bound}",
        f"workload.slo.tpot_ms={bound}")
    assert figures.metrics["capacity_per_s"].mean == capacity
    assert warning in figures.warnings[0]
    assert {s.cached_tokens for s in samples} == {0}
    assert sum(s.retractions for s in samples) > 0
    assert ("retractions/rate_per_s=200.0" in figures.metrics) is (capacity > 0)
