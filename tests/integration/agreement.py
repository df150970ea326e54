"""32 requests put to a server, and how far two servers' answers are apart."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import requests

from kvtuner_sglang.quality import transformers_path
from kvtuner_sglang.quality.prose import prose_windows

PROMPTS, PROMPT_TOKENS, NEW_TOKENS, PAGE = 32, 180, 24, 64
AT_ONCE = 16


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    log_probabilities: list[float]
    cached: int
    retractions: int


def prompts_of(checkpoint: Path) -> list[list[int]]:
    """The same text at 32 starts: windows overlap, but no two share a page from their first token on."""
    tokenizer = transformers_path.load_tokenizer(checkpoint)
    text = prose_windows(tokenizer, 5400, 5400)[0]
    return [text[start : start + PROMPT_TOKENS] for start in range(0, PROMPTS * 160, 160)]


def ask(url: str, prompts: list[list[int]], at_once: int = 1, *, log_probabilities: bool = True) -> list[Answer]:
    """Greedy continuations, `at_once` requests in flight."""

    def one(prompt: list[int]) -> Answer:
        body = {"input_ids": prompt, "return_logprob": log_probabilities,
                "sampling_params": {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}}
        reply = requests.post(f"{url}/generate", json=body, timeout=300)
        assert reply.status_code == 200, reply.text
        meta = reply.json()["meta_info"]
        assert meta["completion_tokens"] == NEW_TOKENS
        values = [entry[0] for entry in meta.get("output_token_logprobs", ())]
        return Answer(reply.json()["output_ids"], values, meta["cached_tokens"], meta.get("num_retractions", 0))

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, prompts))


def moved(some: list[Answer], others: list[Answer]) -> np.ndarray:
    """|difference| of log-probabilities of all tokens up to which both texts are equal."""
    differences = []
    for a, b in zip(some, others, strict=True):
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a.tokens, b.tokens, strict=True))
        pairs = zip(a.log_probabilities, b.log_probabilities, strict=True)
        differences += [abs(x - y) for (x, y), _ in zip(pairs, same, strict=False)]
    assert len(differences) > PROMPTS * NEW_TOKENS / 4, "too few tokens are left to compare"
    return np.array(differences)


def texts_equal(some: list[Answer], others: list[Answer]) -> int:
    return sum(a.tokens == b.tokens for a, b in zip(some, others, strict=True))


def flush_cache(url: str) -> None:
    requests.post(f"{url}/flush_cache", timeout=60).raise_for_status()
