"""The default model behind the real engine with packed keys and values."""

import pytest
import requests

pytestmark = pytest.mark.alone


def generate(server, text, tokens, **options):
    body = {
        "text": text,
        "sampling_params": {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True},
        **options,
    }
    answer = requests.post(f"{server.base_url}/generate", json=body, timeout=120)
    assert answer.status_code == 200
    return answer.json()


def test_it_answers_sensibly_with_the_asked_number_of_tokens(kv4_server):
    answer = generate(kv4_server, "The capital of France is", 8)
    assert answer["meta_info"]["completion_tokens"] == 8
    assert "Paris" in answer["text"]


def test_every_rank_shows_our_pool_within_its_budget(kv4_server):
    state = kv4_server.server_info["kvtuner"]
    (rank,) = state["ranks"]
    assert rank["pool_class"] == "PackedKVPool"
    assert rank["pool_bytes"] + rank["tail_bytes"] <= state["kv_gib"] * 2**30
    by_formula = (state["kv_gib"] * 2**30 - rank["tail_bytes"]) / rank["bytes_per_token"]
    assert 0.97 * by_formula <= kv4_server.server_info["max_total_num_tokens"] <= by_formula


def test_the_log_says_once_a_rank_that_the_plugin_is_in_force(kv4_server):
    (log,) = kv4_server.log_paths
    (line,) = [line for line in log.read_text().splitlines() if "kvtuner: keys and values are packed" in line]
    rank = kv4_server.ranks[0]
    for part in ("K 4 bit per channel", "; V 4 bit per token", "; 4.5 bits an element", "layers 0-29, ",
                 f"{8 * rank['bytes_per_token']:.0f} bits a token", "pages of 64 tokens", "attention reference."):
        assert part in line


def test_a_second_request_reads_the_cached_pages(kv4_server):
    prompt = "Once upon a time there was a little girl who lived near a forest with her grandmother. " * 6
    cold, warm = generate(kv4_server, prompt, 16), generate(kv4_server, prompt, 16)
    assert cold["meta_info"]["cached_tokens"] == 0
    assert warm["meta_info"]["cached_tokens"] > 0
    assert warm["meta_info"]["completion_tokens"] == 16


def test_log_probabilities_come_back_for_every_prompt_token(kv4_server):
    prompt = "The quick brown fox jumps over the lazy dog."
    answer = generate(kv4_server, prompt, 1, return_logprob=True, logprob_start_len=0)
    entries = answer["meta_info"]["input_token_logprobs"]
    assert len(entries) == answer["meta_info"]["prompt_tokens"]
    assert all(entry[0] < 0 for entry in entries[1:])
