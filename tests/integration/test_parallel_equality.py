"""Two nodes of two ranks against one process: the same text in full precision, the noise floor with 4 bits.

Four-bit codes amplify float noise, so other matrix shapes (tensor parallelism) move log-probabilities. How much is
measured first: the same single process with keys and values perturbed by 1e-6, relative.
"""

from pathlib import Path

import numpy as np
import pytest
import requests

from kvtuner_sglang import command_line
from kvtuner_sglang.serving.cluster import running_cluster
from kvtuner_sglang.serving.commands import Measurement

CONF = Path(__file__).parents[2] / "conf"
NOISE = 1e-6
PROMPTS = [
    "The lighthouse keeper wrote in his log every evening, and on the last day of October he noted that the sea",
    "A recipe for bread needs flour, water, salt and yeast. First the flour is mixed with the water, and then",
    "In the year 1969 three men travelled to the Moon. Two of them walked on its surface while the third one",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +",
    "The heart pumps blood through the body. It has four chambers, and the blood enters through the",
    "Dear Sir, I am writing to you about the house on the hill, which has been empty for many years. I would like to",
    "The train left the station at eight o'clock in the morning. Anna sat by the window and watched the fields",
    "Water boils at one hundred degrees Celsius at sea level. On a high mountain it boils at a lower temperature because",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ask(checkpoint, tmp_path_factory):
    """Greedy texts and prompt log-probabilities of all prompts behind a server of the given options."""
    runs = tmp_path_factory.mktemp("runs")

    def answers(quant: str, dist: str, noise: float = 0.0) -> tuple[list[str], np.ndarray]:
        config = command_line.load([f"quant={quant}", f"dist={dist}", f"runs_dir={runs}"], CONF)
        texts, log_probabilities = [], []
        with running_cluster(config, checkpoint, runs / f"{quant}-{dist}-{noise}", lambda line: None,
                             Measurement(kv_noise=noise)) as cluster:
            for prompt in PROMPTS:
                body = {"text": prompt, "return_logprob": True, "logprob_start_len": 0,
                        "sampling_params": {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True}}
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
    print(f"{quant}: mean |difference| of {len(single)} prompt log-probabilities: floor {floor:.5f}, tp2pp2 {difference:.5f}")
    assert floor > 0
    assert difference <= 2 * floor
