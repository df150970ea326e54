"""When a call counts: every rule is fed a violation; what the pool holds; what the engine's log says."""

import pytest

from kvtuner_sglang.errors import MeasurementInvalid
from kvtuner_sglang.speed import validity
from kvtuner_sglang.speed.calls import append_call, read_calls
from kvtuner_sglang.speed.engine_run import decode_steps
from kvtuner_sglang.speed.room import Room, request_tokens

LOG = """[t] Prefill batch, #new-seq: 3
[t] Decode batch, #running-req: 3, #token: 1, token usage: 0.02, cuda graph: True, gen throughput (token/s): 9
[t] Decode batch, #running-req: 4, #token: 1, token usage: 0.02, cuda graph: {graph}, gen throughput (token/s): 9
"""


def test_a_good_call_counts_and_travels(make_call, spec, tmp_path):
    fill = make_call(kind="fill", new_tokens=1, output_min=1, output_max=1, cached_min=0, running=None)
    for call in (make_call(), fill):
        validity.require_call(call, spec)
        append_call(tmp_path / "calls.jsonl", call)
    assert read_calls(tmp_path / "calls.jsonl")[0] == make_call()


@pytest.mark.parametrize(("changes", "rule"), [
    ({"prompt_min": 127}, "prompts_as_sent"),
    ({"output_max": 9}, "outputs_as_asked"),
    ({"cached_min": 63}, "cached_as_planned"),
    ({"cached_max": 129}, "cached_as_planned"),
    ({"workload": "ttft", "cached": 0, "cached_min": 0, "cached_max": 1}, "cached_as_planned"),
    ({"retractions": 1}, "never_retracted"),
    ({"running": 3}, "all_at_once"),
    ({"running": None}, "all_at_once"),
])
def test_every_rule_refuses_its_violation(make_call, spec, changes, rule):
    with pytest.raises(MeasurementInvalid, match=f"^{rule}: "):
        validity.require_call(make_call(**changes), spec)


def test_a_gpu_must_replay_graphs(make_call, spec):
    with pytest.raises(MeasurementInvalid, match="in_graphs"):
        validity.require_call(make_call(), spec.__class__(**{**vars(spec), "device": "cuda"}))


def test_every_rule_is_written_into_the_record():
    assert len(validity.rules_held()) == len(validity.CALL_RULES) + len(validity.RUN_RULES)


def test_the_log_says_how_many_ran_at_once_and_how(tmp_path):
    log = tmp_path / "engine.log"
    log.write_text("Decode batch, #running-req: 99, cuda graph: False, x\n")
    begin = log.stat().st_size
    log.write_text(log.read_text() + LOG.format(graph=True))
    assert decode_steps(log, begin) == (4, True)
    log.write_text(log.read_text()[:begin] + LOG.format(graph=False))
    assert decode_steps(log, begin) == (4, False)
    assert decode_steps(log, log.stat().st_size) == (0, False)


def test_a_request_takes_whole_pages():
    assert request_tokens(128, 96, 64) == 320
    assert request_tokens(100, 10, 1) == 111


def test_the_cache_is_flushed_before_it_would_have_to_evict_a_prompt():
    room = Room(tokens=5000, page_size=1, outputs=99)
    assert room.most(900) == 5
    assert room.enter(2, 900)  # another context than nothing
    assert room.used == 2000
    assert not room.enter(3, 900)  # two prompts are there: their answers, and one more request
    assert room.used == 2000 + 2 * 100 + 1000
    assert room.enter(5, 900)
    assert room.used == 5000
    assert room.enter(1, 400)
    assert (room.context, room.used) == (400, 500)
