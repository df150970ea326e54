"""Two nodes of two ranks against one process: the same text in full precision, the noise floor with low bits.

Four-bit codes amplify float noise, so other matrix shapes (tensor parallelism) move log-probabilities. How much is
measured first: the same single process with keys and values perturbed by 1e-6, relative.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from kvtuner_sglang import command_line
from kvtuner_sglang.quality.prose import prose_text
from kvtuner_sglang.quant import KVShape, load_plan
from kvtuner_sglang.serving.cluster import running_cluster
from kvtuner_sglang.serving.commands import Measurement

CONF = Path(__file__).parents[2] / "conf"
MIXED_PLAN = Path(__file__).with_name("mixed_plan.yaml")
QUANTS = {"bf16": ("quant=bf16",), "kv4": ("quant=kv4",), "mixed": ("quant=plan", f"plan.path={MIXED_PLAN}")}
NOISE = 1e-6
PROMPT_CHARACTERS = 900  # about 200 tokens: three whole pages that are read as stored
PROMPTS = [text[start : start + PROMPT_CHARACTERS] for text in (prose_text(),) for start in range(0, 8 * 1000, 1000)]

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Answers:
    """Greedy texts and the log-probabilities of all prompt tokens; state: the kvtuner part of /server_info."""

    texts: list[str]
    log_probabilities: np.ndarray
    state: dict[str, Any]


@pytest.fixture(scope="module")
def ask(checkpoint, tmp_path_factory):
    """The answers to all prompts behind a server of the given options, started once."""
    runs, known = tmp_path_factory.mktemp("runs"), {}

    def ask(quant: str, dist: str, noise: float = 0.0) -> Answers:
        if (quant, dist, noise) not in known:
            config = command_line.load([*QUANTS[quant], f"dist={dist}", f"runs_dir={runs}"], CONF)
            folder = runs / f"{quant}-{dist}-{noise}"
            with running_cluster(config, checkpoint, folder, lambda line: None, Measurement(kv_noise=noise)) as cluster:
                known[quant, dist, noise] = answers(cluster)
        return known[quant, dist, noise]

    return ask


def answers(cluster) -> Answers:
    texts, log_probabilities = [], []
    for prompt in PROMPTS:
        body = {
            "text": prompt,
            "return_logprob": True,
            "logprob_start_len": 0,
            "sampling_params": {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True},
        }
        answer = requests.post(f"{cluster.base_url}/generate", json=body, timeout=600)
        assert answer.status_code == 200
        texts.append(answer.json()["text"])
        log_probabilities += [entry[0] for entry in answer.json()["meta_info"]["input_token_logprobs"][1:]]
    return Answers(texts, np.array(log_probabilities), cluster.server_info["kvtuner"])


def test_full_precision_gives_the_same_text_on_four_ranks(ask):
    assert ask("bf16", "tp2pp2").texts == ask("bf16", "single").texts


@pytest.mark.parametrize("quant", ["kv4", "mixed"])
def test_low_bits_on_four_ranks_stay_within_twice_the_noise_floor(ask, quant, record_property):
    single = ask(quant, "single").log_probabilities
    floor = np.abs(ask(quant, "single", NOISE).log_probabilities - single).mean()
    difference = np.abs(ask(quant, "tp2pp2").log_probabilities - single).mean()
    record_property("floor_and_difference", (floor, difference))
    print(quant, f"floor {floor:.4g}, four ranks {difference:.4g}")  # noqa: T201
    assert floor > 1e-4, "without quantized pages in view this test says nothing"
    assert difference <= 2 * floor


def test_every_stage_of_a_mixed_plan_offers_what_the_smallest_has_room_for(ask):
    state, plan = ask("mixed", "tp2pp2").state, load_plan(MIXED_PLAN).formats(None, 30)
    budget, rooms = state["kv_gib"] * 2**30, {}
    for rank in state["ranks"]:
        shape = KVShape(rank["kv_heads"], 64, 4, 64)  # fp32, pages of 64
        first, last = rank["layers"]
        bytes_per_token = shape.bytes_per_token(plan[first:last])
        assert rank["bytes_per_token"] == bytes_per_token
        assert rank["pool_bytes"] == bytes_per_token * (rank["tokens"] + 64)
        assert rank["pool_bytes"] + rank["tail_bytes"] <= budget
        rooms[first] = (budget - rank["tail_bytes"]) / bytes_per_token
    print(f"tokens {state['max_total_num_tokens']}, room by stage {rooms}")  # noqa: T201
    assert list(rooms) == [0, 15]
    assert rooms[15] > 1.1 * rooms[0], "equal stages would not show which one counts"
    assert 0.97 * rooms[0] <= state["max_total_num_tokens"] <= rooms[0]
    assert {rank["tokens"] for rank in state["ranks"]} == {state["max_total_num_tokens"]}
