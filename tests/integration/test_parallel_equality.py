"""Two nodes of two ranks against one process: the same text in full precision, the noise floor with 4 bits.

Four-bit codes amplify float noise, so other matrix shapes (tensor parallelism) move log-probabilities. How much is
measured first: the same single process with keys and values perturbed by 1e-6, relative.
"""

from pathlib import Path

import numpy as np
import pytest
import requests

from kvtuner_sglang import command_line
from kvtuner_sglang.quality.prose import prose_text
from kvtuner_sglang.serving.cluster import running_cluster
from kvtuner_sglang.serving.commands import Measurement

CONF = Path(__file__).parents[2] / "conf"
NOISE = 1e-6
PROMPT_CHARACTERS = 900  # about 200 tokens: three whole pages that are read as stored
PROMPTS = [text[start : start + PROMPT_CHARACTERS] for text in (prose_text(),) for start in range(0, 8 * 1000, 1000)]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ask(checkpoint, tmp_path_factory):
    """Greedy texts and prompt log-probabilities of all prompts behind a server of the given options."""
    runs = tmp_path_factory.mktemp("runs")

    def answers(quant: str, dist: str, noise: float = 0.0) -> tuple[list[str], np.ndarray]:
        config = command_line.load([f"quant={quant}", f"dist={dist}", f"runs_dir={runs}"], CONF)
        texts, log_probabilities = [], []
        with running_cluster(
            config, checkpoint, runs / f"{quant}-{dist}-{noise}", lambda line: None, Measurement(kv_noise=noise)
        ) as cluster:
            for prompt in PROMPTS:
                body = {
                    "text": prompt,
                    "return_logprob": True,
                    "logprob_start_len": 0,
                    "sampling_params": {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True},
                }
                answer = requests.post(f"{cluster.base_url}/generate", json=body, timeout=120)
                assert answer.status_code == 200
                texts.append(answer.json()["text"])
                log_probabilities += [entry[0] for entry in answer.json()["meta_info"]["input_token_logprobs"][1:]]
        return texts, np.array(log_probabilities)

    return answers


def test_full_precision_gives_the_same_text_on_four_ranks(ask):
    single, _ = ask("bf16", "single")
    parallel, _ = ask("bf16", "tp2pp2")
    assert parallel == single


@pytest.mark.parametrize("quant", ["kv4"])
def test_four_bits_on_four_ranks_stay_within_twice_the_noise_floor(ask, quant, record_property):
    _, single = ask(quant, "single")
    _, noisy = ask(quant, "single", NOISE)
    _, parallel = ask(quant, "tp2pp2")
    floor, difference = np.abs(noisy - single).mean(), np.abs(parallel - single).mean()
    record_property("floor_and_difference", (floor, difference))
    assert floor > 1e-4, "without quantized pages in view this test says nothing"
    assert difference <= 2 * floor
