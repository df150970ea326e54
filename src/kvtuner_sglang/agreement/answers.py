"""The same greedy requests put to a server, and what it answered."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from kvtuner_sglang.errors import MeasurementInvalid, UserError
from kvtuner_sglang.quality import transformers_path
from kvtuner_sglang.quality.prose import prose_text

STRIDE = 8 / 9  # of a prompt, from one prompt's start to the next


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, the log-probability of each, and how many prompt tokens came from the prefix cache."""

    tokens: list[int]
    log_probabilities: list[float]
    cached: int
    retractions: int


def prompts_of(checkpoint: Path, prompts: int, prompt_tokens: int) -> list[list[int]]:
    """The same text at `prompts` starts: windows overlap, but no two share a page from their first token on.

    Raises UserError if the text is too short under the checkpoint's tokenizer.
    """
    text = transformers_path.load_tokenizer(checkpoint).encode(prose_text(), add_special_tokens=False)
    stride = int(prompt_tokens * STRIDE)
    if (prompts - 1) * stride + prompt_tokens > len(text):
        raise UserError(f"{prompts} prompts of {prompt_tokens} tokens do not fit a text of {len(text)}: ask for fewer "
                        "(agreement.prompts) or shorter ones.")
    return [text[start : start + prompt_tokens] for start in range(0, prompts * stride, stride)]


def ask(url: str, prompts: Sequence[list[int]], new_tokens: int, at_once: int = 1, *, log_probabilities: bool = True,
        timeout_s: float = 300) -> list[Answer]:
    """Greedy continuations of exactly `new_tokens`, `at_once` requests in flight.

    Raises MeasurementInvalid at the first answer that is not HTTP 200 or not as long as it must be.
    """

    def one(prompt: list[int]) -> Answer:
        body: dict[str, Any] = {"input_ids": prompt, "return_logprob": log_probabilities,
                                "sampling_params": {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}}
        try:
            reply = requests.post(f"{url}/generate", json=body, timeout=timeout_s)
        except requests.RequestException as error:
            raise MeasurementInvalid(f"http_200: {url} did not answer ({error}).") from error
        if reply.status_code != 200:
            raise MeasurementInvalid(f"http_200: HTTP status {reply.status_code}: {reply.text[:200]}")
        return read_answer(reply.json(), len(prompt), new_tokens, log_probabilities)

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, prompts))


def read_answer(reply: dict[str, Any], prompt_tokens: int, new_tokens: int, log_probabilities: bool) -> Answer:
    """The answer in a reply of /generate; raises MeasurementInvalid if it is not whole."""
    meta = reply["meta_info"]
    values = [entry[0] for entry in meta.get("output_token_logprobs", ())]
    counts = (meta["prompt_tokens"], meta["completion_tokens"], len(reply["output_ids"]), len(values))
    asked = (prompt_tokens, new_tokens, new_tokens, new_tokens if log_probabilities else len(values))
    if counts != asked:
        raise MeasurementInvalid(f"tokens_as_asked: prompt tokens, output tokens, token ids and log-probabilities are "
                                 f"{counts} where {asked} were asked for.")
    if not all(value is not None and math.isfinite(value) for value in values):
        raise MeasurementInvalid("finite: a log-probability is not a number.")
    if "num_retractions" not in meta:
        raise MeasurementInvalid("retractions_reported: the server does not say how often the request was retracted.")
    return Answer(reply["output_ids"], values, meta["cached_tokens"], meta["num_retractions"])


def flush_cache(url: str) -> None:
    requests.post(f"{url}/flush_cache", timeout=60).raise_for_status()
