"""Waits for a starting cluster, says what it waits for, and stops waiting as soon as it cannot come."""

import time
from collections.abc import Callable, Sequence

from kvtuner_sglang.errors import RunFailed
from kvtuner_sglang.serving import logs
from kvtuner_sglang.serving.client import answers_health
from kvtuner_sglang.serving.launcher import NodeProcess

POLL_S = 0.5
SAY_EVERY_S = 5.0
# A node that ends takes others with it; the first cause may stand in another node's log a moment later.
SETTLE_S = 1.0
EFFECTS = ("Connection closed by peer", "Connection reset", "Timed out")
ANSWER_TIMEOUT_S = 30.0  # /health_generate answers after 20 s at the latest


def wait_until_ready(nodes: Sequence[NodeProcess], timeout_s: float, say: Callable[[str], None]) -> float:
    """Seconds until node 0 generated a token and all other nodes answer /health; raises RunFailed with the cause."""
    started, said = time.monotonic(), time.monotonic()
    while True:
        _raise_if_ended(nodes)
        if _ready(nodes):
            return time.monotonic() - started
        waited = time.monotonic() - started
        if waited > timeout_s:
            raise RunFailed(f"the server was not ready after {waited:.0f} s, {_doing(nodes)}: see "
                            f"{nodes[0].log_path}, or raise server.start_timeout_s.")
        if time.monotonic() - said > SAY_EVERY_S:
            said = time.monotonic()
            say(f"{waited:4.0f} s, waiting for the server: {_doing(nodes)}")
        time.sleep(POLL_S)


def _ready(nodes: Sequence[NodeProcess]) -> bool:
    others = all(answers_health(node.command.url, 5.0) for node in nodes[1:])
    # /health costs nothing while the HTTP server is not up yet or still loading; generating is asked for only then.
    first = nodes[0].command.url
    return others and answers_health(first, 5.0) and answers_health(first, ANSWER_TIMEOUT_S, "/health_generate")


def _doing(nodes: Sequence[NodeProcess]) -> str:
    return "; ".join(f"{node.name}: {logs.last_step(node.log_path)}" for node in nodes)


def _raise_if_ended(nodes: Sequence[NodeProcess]) -> None:
    ended = [node for node in nodes if node.process.poll() is not None]
    refused = any(logs.refusal(node.log_path) for node in nodes)
    if not ended and not refused:
        return
    time.sleep(SETTLE_S)
    raise RunFailed(why_ended(nodes))


def why_ended(nodes: Sequence[NodeProcess]) -> str:
    """One sentence: our plugin's own refusal in any node's log, else the last error of the node that ended."""
    for node in nodes:
        if sentence := logs.refusal(node.log_path):
            return sentence
    ended = [node for node in nodes if node.process.poll() is not None] or list(nodes)
    # A peer that vanished is the effect: a node whose log names another error comes first.
    ended.sort(key=lambda node: _is_effect(logs.last_error(node.log_path)))
    node = ended[0]
    cause = logs.last_error(node.log_path) or "its log names no error"
    return f"{node.name} ended with exit code {node.process.returncode} ({cause}): see {node.log_path}."


def _is_effect(error: str | None) -> bool:
    return error is None or any(words in error for words in EFFECTS)
