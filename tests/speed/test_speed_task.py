"""The whole path on this machine's CPU with a real engine, and runs that may not count or break."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtuner_sglang import command_line
from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.record import load_record
from kvtuner_sglang.evidence.samples import read_samples
from kvtuner_sglang.speed import plan
from kvtuner_sglang.tasks import speed

pytestmark = pytest.mark.alone
CONF = Path(__file__).parents[2] / "conf"
ON_CPU = ("server.device=cpu", "server.kv_gib=0.05", "tracking=disabled")


def load(*words: str):
    return command_line.load(["task=speed", "model=tiny_dummy", "speed=tiny", *words], CONF)


@pytest.fixture
def one_core() -> Iterator[None]:
    """Threads that wait for each other on shared cores are fifty times as slow now and then."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    yield
    os.sched_setaffinity(0, cores)


def run(tmp_path, *words):
    said: list[str] = []
    outcome = speed.run(load(*ON_CPU, *words, f"runs_dir={tmp_path / 'runs'}"), words, said.append)
    return outcome, load_record(outcome.run_dir), said


@pytest.mark.usefixtures("one_core")
def test_a_packed_cache_is_measured_from_start_to_record(tmp_path):
    outcome, record, said = run(tmp_path, "quant=kv4")
    assert (outcome.status, outcome.reason) == ("ok", None)
    assert record.metric("decode_tok_s", batch=2, context=256).n == 2
    assert record.metric("tpot_ms", batch=1, context=128).p50 > 0
    assert record.metric("ttft_ms", prompt_tokens=100).n == 2
    assert record.metric("ttft_cached_ms", cached=256, new=64).n == 2
    tokens, formula = record.metric("kv_tokens").p50, record.metric("kv_tokens_formula").p50
    assert 0.97 <= tokens / formula <= 1.0
    assert any("weights are random" in warning for warning in record.warnings)
    samples = read_samples(outcome.run_dir)
    assert samples[0]["arguments"]["load_format"] == "dummy"
    assert (samples[0]["attention"], samples[0]["dtype"]) == ("reference", "float32")
    timed = [s for s in samples if s["kind"] == "timed" and s["workload"] == "decode"]
    assert len(timed) == 8
    assert {(s["running"] == s["batch"], s["retractions"]) for s in timed} == {(True, 0)}
    assert any(line.startswith("  decode") for line in said)


@pytest.mark.usefixtures("one_core")
def test_saturation_fills_the_pool_of_the_plain_cache(tmp_path):
    _, record, _ = run(tmp_path, "quant=bf16", "server.kv_gib=0.006", "speed.decode=[{batch:99,context:256}]",
                       "speed.saturation=[256]", "speed.ttft_cached=[]", "speed.ttft_tokens=[]")
    assert record.status == "ok", record.reason
    (key,) = [key for key in record.metrics if key.startswith("saturation_decode_tok_s/")]
    assert key == "saturation_decode_tok_s/batch=7/context=256"  # 3144 tokens, 256 + 3 * 64 + 1 each
    assert any("99 x 256 tokens do not fit" in warning for warning in record.warnings)
    assert not [name for name in record.metrics if name.startswith("decode_tok_s")]


def stand_in(monkeypatch, script):
    monkeypatch.setattr(plan, "engine_command", lambda python, folder: (sys.executable, "-c", script, str(folder)))


def test_a_call_that_does_not_count_leaves_samples_and_no_figure(monkeypatch, tmp_path):
    stand_in(monkeypatch, """
import sys
from pathlib import Path
from kvtuner_sglang.speed.calls import Call, append_call
call = Call("timed", "ttft", 0, 1, 9, 0, 1, 1.0, 9, 9, 8, 8, 1, 1, 0, None, None)
append_call(Path(sys.argv[1]) / "calls.jsonl", call)
print("refused: cached_as_planned: 8 tokens came from the prefix cache.")
raise SystemExit(2)
""")
    outcome, record, said = run(tmp_path)
    assert (outcome.status, record.status) == ("invalid", "invalid")
    assert record.reason.startswith("cached_as_planned")
    assert record.metrics == {}
    assert len(read_samples(outcome.run_dir)) == 1
    assert "invalid" in said[-1]


def test_an_engine_that_breaks_is_a_failed_run_that_names_its_log(monkeypatch, tmp_path):
    stand_in(monkeypatch, "import sys; sys.exit('no memory')")
    _, record, _ = run(tmp_path)
    assert record.status == "failed"
    assert "engine.log" in record.reason


def test_an_engine_that_hangs_is_ended(monkeypatch, tmp_path):
    stand_in(monkeypatch, "import time; time.sleep(60)")
    _, record, _ = run(tmp_path, "speed.timeout_s=1")
    assert record.status == "failed"
    assert "bound 1 s" in record.reason


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="a machine without a GPU")
@pytest.mark.parametrize(("words", "part"), [
    ([], "needs an NVIDIA GPU"),
    (["server.device=cpu", "quant=fp8"], "neither SGLang's fp8"),
    (["server.device=cuda"], "needs an NVIDIA GPU"),
])
def test_without_a_gpu_nothing_is_written(tmp_path, words, part):
    with pytest.raises(UserError, match=part):
        speed.run(load(*words, f"runs_dir={tmp_path / 'runs'}"), words, lambda line: None)
    assert not (tmp_path / "runs").exists()
