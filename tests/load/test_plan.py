"""What each cache protocol sends, and how many tokens it says the prefix cache holds."""

from collections.abc import Callable
from itertools import chain

import pytest

from kvtuner_sglang.config import RunConfig
from kvtuner_sglang.load.plan import Conversation, Planner, prompt_lengths
from kvtuner_sglang.measure.prompts import PromptSource
from kvtuner_sglang.quant import KVShape

VOCABULARY = 49152


@pytest.fixture
def planner(load_config: Callable[..., RunConfig]) -> Callable[..., Planner]:
    def make(*overrides: str, page: int = 64) -> Planner:
        return Planner(load_config(*overrides).workload, PromptSource(VOCABULARY, 0), page)

    return make


@pytest.mark.parametrize(("quant", "room"), [("bf16", 2.79), ("kv8_token", 10.51), ("kv4_token", 19.85)])
def test_the_capacity_experiment_fills_every_pool(load_config: Callable[..., RunConfig], quant: str,
                                                  room: float) -> None:
    """Requests of SmolLM2 on a CPU that each pool holds: fewer than are sent, or its extra room could not show."""
    config = load_config("exp=capacity", f"quant={quant}")
    workload = config.workload
    bytes_per_token = KVShape(kv_heads=3, head_dim=64, itemsize=4, page_size=1).bytes_per_token(config.quant.plan(30))
    requests = config.server.kv_gib * 2**30 / bytes_per_token / workload.longest
    assert requests == pytest.approx(room, abs=0.02)
    assert requests < workload.requests <= config.server.max_running_requests


def lengths(turns: Conversation) -> list[int]:
    """Tokens of each turn's whole prompt, as it will be sent."""
    found, said = [], 0
    for turn in turns:
        found.append(said + len(turn.input_ids))
        said = found[-1] + turn.output_tokens
    return found


def test_cold_prompts_share_nothing(planner: Callable[..., Planner]) -> None:
    source = planner("workload=closed")
    first, second = source.draw("a"), source.draw("b")
    assert first.prime == second.prime == ()
    requests = list(chain(*first.measured, *second.measured))
    assert len({r.request_id for r in requests}) == len({r.input_ids[0] for r in requests}) == len(requests) == 16
    assert {(len(r.input_ids), r.output_tokens, r.cached_tokens_planned) for r in requests} == {(160, 16, 0)}


@pytest.mark.parametrize(("page", "cached"), [(64, 128), (1, 159), (160, 0)])
def test_warm_prompts_were_all_sent_before(planner: Callable[..., Planner], page: int, cached: int) -> None:
    drawn = planner("workload=closed", "workload.cache=warm", page=page).draw("a")
    assert [r.input_ids for [r] in drawn.prime] == [r.input_ids for [r] in drawn.measured]
    assert {r.cached_tokens_planned for [r] in drawn.prime} == {0}
    assert {r.cached_tokens_planned for [r] in drawn.measured} == {cached}
    assert not {r.request_id for [r] in drawn.prime} & {r.request_id for [r] in drawn.measured}


@pytest.mark.parametrize(("page", "cached"), [(64, 64), (1, 100)])
def test_a_shared_prefix_is_shared_to_the_token(planner: Callable[..., Planner], page: int, cached: int) -> None:
    drawn = planner("workload=open", "workload.cache=shared_prefix", "workload.shared_tokens=100", page=page).draw("a")
    requests = list(chain(*drawn.prime, *drawn.measured))
    assert len(drawn.prime) == 1
    assert len({tuple(r.input_ids[:100]) for r in requests}) == 1
    assert len({r.input_ids[100] for r in requests}) == len(requests) == 7
    assert {len(r.input_ids) for r in requests} == {160}
    assert {r.cached_tokens_planned for [r] in drawn.measured} == {cached}


@pytest.mark.parametrize(("page", "cached"), [(64, [128, 128, 192]), (1, [128, 191, 255])])
def test_a_turn_finds_what_was_said_before(planner: Callable[..., Planner], page: int, cached: list[int]) -> None:
    """Turns of 48 + 16 tokens behind 128: before turn 2 there are 128 + 48 + 16 - 1 in the cache."""
    drawn = planner("workload=multiturn", page=page).draw("a")
    assert len(drawn.measured) == 2
    for turns in drawn.measured:
        assert [r.cached_tokens_planned for r in turns] == cached
        assert [len(r.input_ids) for r in turns] == [176, 48, 48]
        assert lengths(turns) == [176, 240, 304]
        assert turns[0].input_ids[:128] == drawn.prime[0][0].input_ids[:128]
    assert len(drawn.prime) == len(drawn.prime[0]) == 1


@pytest.mark.parametrize("words", [
    ["workload=closed"], ["workload=open", "workload.cache=warm"], ["workload=longctx"], ["workload=capacity"],
    ["workload=multiturn"], ["workload=closed", "workload.cache=shared_prefix", "workload.shared_tokens=64"]])
def test_warm_ups_are_as_long_and_share_nothing(planner: Callable[..., Planner], words: list[str]) -> None:
    source = planner(*words)
    warm_ups, measured = source.warm_up(3), source.draw("a").measured
    for turns in (*warm_ups, *measured):
        assert lengths(turns) == prompt_lengths(source.workload)
    assert {turns[0].cached_tokens_planned for turns in warm_ups} == {0}
    assert len({turns[0].input_ids[0] for turns in (*warm_ups, *measured[:1])}) == 4
