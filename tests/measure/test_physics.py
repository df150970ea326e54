"""Floors by hand, what they refuse, and that flat times alone refuse nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from kvtuner_sglang.config import RunConfig, parse
from kvtuner_sglang.errors import MeasurementInvalid, RunFailed
from kvtuner_sglang.measure import physics, roofline
from kvtuner_sglang.measure.hardware import Floor, Peak, peak_of
from kvtuner_sglang.measure.metrics import summarize
from kvtuner_sglang.serving.client import Sample

CONF = Path(__file__).parents[2] / "conf"
# 1000 weights in layers, an embedding and an lm_head of 500 each; no attention to speak of
SMALL = SimpleNamespace(layers=1, q_heads=1, head_dim=0, hidden_size=5, vocab_size=100, parameters=2000)
# 10 tokens: 2 * (1000 * 10 + 500) FLOPs = 21 ms; one: 2 * 1500 = 3 ms, but 1500 weights of 4 bytes are 6 ms to read
FLOOR = Floor(Peak(bytes_per_s=1e6, flops_per_s=1e6, source="a test"), SMALL, 4, 0.0)


def config(*overrides: str) -> RunConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return parse(OmegaConf.to_container(compose("config", ["server.device=cpu", *overrides]), resolve=True))


def sample(make_sample: Callable[..., Sample], total_ms: float, prompt: int, tokens: int,
           first_ms: float | None = None) -> Sample:
    """An answer whose first token takes as long as each of the others, unless `first_ms` says otherwise."""
    first = total_ms / tokens if first_ms is None else first_ms
    steps = [first + (total_ms - first) * n / max(tokens - 1, 1) for n in range(tokens)]
    return make_sample(prompt_tokens_sent=prompt, output_tokens_asked=tokens,
                       token_times_s=tuple(1.0 + ms / 1e3 for ms in steps))


def test_the_floor_is_the_longer_of_arithmetic_and_reading() -> None:
    assert FLOOR.prefill_ms(0, 10) == pytest.approx(21.0)
    assert FLOOR.prefill_ms(0, 1) == pytest.approx(6.0)
    assert FLOOR.decode_step_ms(1, 0) == pytest.approx(6.0)


def test_attention_counts_what_a_token_sees() -> None:
    # four FLOPs a channel of each of 3 + 2 + 1 visible tokens
    seeing = SimpleNamespace(layers=2, q_heads=3, head_dim=50, hidden_size=5, vocab_size=100, parameters=2000)
    assert Floor(FLOOR.peak, seeing, 1, 0.0).prefill_ms(0, 3) == pytest.approx(2 * 3.5 + 4 * 300 * 6 / 1e3)


@pytest.mark.parametrize(("total_ms", "first_ms", "part"), [
    (27.5, 21.5, None), (27.5, 20.5, "first token after 20.5"), (26.5, 21.5, "2 tokens after 26.5")])
def test_a_token_before_its_time(make_sample: Callable[..., Sample], total_ms: float, first_ms: float,
                                 part: str | None) -> None:
    taken = [sample(make_sample, total_ms, 10, 2, first_ms)]
    if part is None:
        physics.require_above_floor(taken, FLOOR)
    else:
        with pytest.raises(MeasurementInvalid, match=f"faster_than_floor: .*{part}"):
            physics.require_above_floor(taken, FLOOR)
    physics.require_above_floor(taken, Floor(None, SMALL, 4, 0.0))


def test_what_was_cached_need_not_be_computed(make_sample: Callable[..., Sample]) -> None:
    # 3 of 10 tokens are new: 2 * (1000 * 3 + 500) FLOPs are 7 ms
    taken = sample(make_sample, 14.0, 10, 2, 8.0)
    taken.cached_tokens = 7
    physics.require_above_floor([taken], FLOOR)
    taken.cached_tokens = 3
    with pytest.raises(MeasurementInvalid, match=r"first token after 8\.000 ms, which takes this machine 15\.000"):
        physics.require_above_floor([taken], FLOOR)


def test_a_median_step_below_reading_the_weights() -> None:
    # one burst of tokens to a busy client is no lie; half of them are
    physics.require_tpot_above_floor({"tpot_ms/concurrency=1": summarize([0.0, 6.5, 7.0], "ms")}, FLOOR)
    with pytest.raises(MeasurementInvalid, match="faster_than_floor: tpot_ms/concurrency=1"):
        physics.require_tpot_above_floor({"tpot_ms/concurrency=1": summarize([0.0, 5.5, 7.0], "ms")}, FLOOR)


@pytest.mark.parametrize(("alone_ms", "loaded_ms", "loaded", "refused"), [
    ((50, 54, 46), (54, 46, 50), (10, 8), True),  # 50 ms whatever is asked, give or take 4
    ((50, 50, 50), (85.9, 99, 86), (10, 8), True),  # six steps of 6 ms are 36
    ((50, 50, 50), (86.1, 99, 87), (10, 8), False),
    ((99, 50, 300), (86.1, 400, 99), (10, 8), False),  # what other work added to some is in neither
    ((50, 50, 50), (50, 50, 50), (10, 3), False),  # hardly more tokens
    ((50, 50, 50), (50, 50, 50), (9, 8), False),  # shorter prompts
    ((), (50,), (10, 8), False),
    ((50,), (), (10, 8), False),
])
def test_the_same_time_for_any_work(make_sample: Callable[..., Sample], alone_ms: tuple[float, ...],
                                    loaded_ms: tuple[float, ...], loaded: tuple[int, int], refused: bool) -> None:
    """Prompts of 10 and answers of 2 tokens alone, then `loaded` tokens."""
    alone = [sample(make_sample, ms, 10, 2) for ms in alone_ms] + [sample(make_sample, 10.0, 11, 2)]
    under_load = [sample(make_sample, ms, *loaded) for ms in loaded_ms]
    physics.require_work_takes_time(alone, under_load, Floor(None, SMALL, 4, 0.0))
    if refused:
        with pytest.raises(MeasurementInvalid, match=r"constant_time: .* 6 more take this machine 36\.0 ms at least"):
            physics.require_work_takes_time(alone, under_load, FLOOR)
    else:
        physics.require_work_takes_time(alone, under_load, FLOOR)


def test_all_ranks_compute_and_one_stage_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(physics, "cpu_server_environment", lambda tp, ranks, node_rank: {"OMP_NUM_THREADS": "3"})
    cpu = physics.peak_of_run(roofline.Roofline("cpu", "float32", 1, 10.0, 100.0), config("dist=tp2pp2"))
    assert (cpu.flops_per_s, cpu.bytes_per_s) == (2 * 4 * 3 * 10, 2 * 2 * 3 * 100)
    gpu = physics.peak_of_run(roofline.Roofline("cuda", "bfloat16", 1, 10.0, 100.0), config("dist=tp2pp2"))
    assert (gpu.flops_per_s, gpu.bytes_per_s) == (2 * 4 * 10, 2 * 2 * 100)


def test_the_record_gets_the_floors() -> None:
    metrics = physics.floor_metrics(FLOOR, [1, 10])
    assert {key: metric.p50 for key, metric in metrics.items()} == pytest.approx(
        {"tpot_floor_ms": 6.0, "ttft_floor_ms/prompt_tokens=1": 6.0, "ttft_floor_ms/prompt_tokens=10": 21.0})
    assert physics.floor_metrics(Floor(None, SMALL, 4, 0.0), [1]) == {}


def test_a_measured_roofline_is_kept_for_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTUNER_CACHE", str(tmp_path))
    monkeypatch.setattr(roofline, "_in_a_child", lambda *words: roofline.measure(*words, seconds=0.01))
    said: list[str] = []
    first = roofline.roofline("cpu", "float32", 4 << 20, "this machine", said.append)
    assert first.flops_per_s > 1e6
    assert first.bytes_per_s > 1e6
    assert (roofline.roofline("cpu", "float32", 4 << 20, "this machine", said.append), len(said)) == (first, 1)
    roofline.roofline("cpu", "float32", 4 << 20, "another machine", said.append)
    roofline.roofline("cpu", "float32", 8 << 20, "this machine", said.append)
    assert len(said) == 3
    [kept, *_] = tmp_path.glob("roofline/*.json")
    assert "machine" in json.loads(kept.read_text())["machine"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_is_measured_near_its_data_sheet() -> None:
    peak = peak_of(torch.cuda.get_device_name())
    found = roofline.measure("cuda", "bfloat16", 1 << 30)
    assert peak is not None, "a card that PEAKS does not list"
    assert 0.3 < found.flops_per_s / peak.flops_per_s < 1.05
    assert 0.5 < found.bytes_per_s / peak.bytes_per_s < 1.05


def test_a_roofline_that_cannot_be_measured_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTUNER_CACHE", str(tmp_path))
    with pytest.raises(RunFailed, match=r"roofline could not be measured \(.*no_such_type"):
        roofline.roofline("cpu", "no_such_type", 1 << 20, "this machine", lambda _line: None)
    assert not list(tmp_path.glob("roofline/*"))
