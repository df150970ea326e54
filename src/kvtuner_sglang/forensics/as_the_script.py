"""The seed's script as far as its report and its figures show it: what it did, and so what it could not see.

It posted prompts as text to /generate of node 1, each on a connection of its own, and timed until the body had been
read.  A body of JSON was a success.  Nothing looked at the HTTP status, at the number of tokens, or for any text.
Here the status is written down beside the time; nothing else is different.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import requests

from kvtuner_sglang.config import ThroughputConfig, TtftConfig
from kvtuner_sglang.errors import RunFailed

REPLY = "node1_reply"  # one prompt at a time
LOADED_REPLY = "node1_loaded_reply"  # several at once
WORD = "word "  # about one token; node 1 never reads it
BODY_CHARACTERS = 200
TIMEOUT_S = 30.0

_direct = {"http": "", "https": ""}  # a proxy must not stand in between


@dataclass(frozen=True)
class NodeReply:
    """What one post to node 1 brought; times are time.perf_counter() seconds, and no time to a first token.

    success_to_the_script: the body was JSON.  http_status and body, 200 characters of it, are what it did not look at.
    """

    kind: str
    url: str
    prompt_tokens: int
    concurrency: int
    sent_s: float
    ended_s: float
    http_status: int
    success_to_the_script: bool
    body: str

    @property
    def reply_ms(self) -> float:
        return (self.ended_s - self.sent_s) * 1000.0


def post(url: str, kind: str, prompt_tokens: int, output_tokens: int, concurrency: int) -> NodeReply:
    """One request as the script made it; raises RunFailed if nothing answers."""
    body: dict[str, Any] = {"text": WORD * prompt_tokens,
                            "sampling_params": {"temperature": 0.0, "max_new_tokens": output_tokens}}
    sent_s = time.perf_counter()
    try:
        answer = requests.post(f"{url}/generate", json=body, timeout=TIMEOUT_S, proxies=_direct)
        is_json = _is_json(answer)
    except requests.RequestException as error:
        raise RunFailed(f"node 1 at {url} did not answer at all ({error}): see its log.") from error
    ended_s = time.perf_counter()
    return NodeReply(kind, url, prompt_tokens, concurrency, sent_s, ended_s, answer.status_code, is_json,
                     answer.text[:BODY_CHARACTERS])


def _is_json(answer: requests.Response) -> bool:
    try:
        answer.json()
    except requests.JSONDecodeError:
        return False
    return True


def run_script(url: str, ttft: TtftConfig, load: ThroughputConfig,
               keep: Callable[[NodeReply], None]) -> list[NodeReply]:
    """Its "TTFT" and its throughput test against `url`; every reply goes to `keep` as it comes. Raises RunFailed."""
    replies = []
    for tokens in ttft.prompt_tokens:
        for _ in range(ttft.repeats):
            replies.append(post(url, REPLY, tokens, 1, concurrency=1))
            keep(replies[-1])
    for concurrency in load.concurrency:
        with ThreadPoolExecutor(concurrency) as workers:
            waiting = [workers.submit(post, url, LOADED_REPLY, load.prompt_tokens, load.output_tokens, concurrency)
                       for _ in range(load.requests_at(concurrency))]
            for future in waiting:
                replies.append(future.result())
                keep(replies[-1])
    return replies
