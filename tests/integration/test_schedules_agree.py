"""32 requests behind kv4, however the engine schedules them.

Where the matrix shapes are the same (a warm prefix cache after a cold one) texts are equal and log-probabilities agree
within 1e-4.  Other shapes (whole prompts in one chunk, batches of 16, mixed chunks under the overlap schedule, forced
retractions, four ranks) move codes by float noise; how much is measured first: the same requests with keys and values
perturbed by 1e-6, relative.  Only tokens whose earlier tokens are all equal are compared.
"""

import contextlib
import json
import re
from collections.abc import Iterator

import pytest
import requests
from launch import Node, free_port, nodes, other_plugin, wait_ready

from kvtuner_sglang.agreement import answers
from kvtuner_sglang.agreement.answers import Answer, flush_cache
from kvtuner_sglang.agreement.compare import NOISE, enough, moved, texts_equal

PROMPTS, PROMPT_TOKENS, NEW_TOKENS, PAGE, AT_ONCE = 32, 180, 24, 64, 16
SAME_SHAPES = 1e-4
FLAGS = (
    "--enable-kvtuner-quant", "--kvtuner-nbits-key", "4", "--kvtuner-nbits-value", "4", "--kvtuner-kv-gib", "1.25",
    "--max-running-requests", str(AT_ONCE), "--context-length", "2048",
)
CHUNKS = ("--chunked-prefill-size", str(PAGE))
COUNT_MIXED_PASSES = """
    from kvtuner_sglang.plugin.reference_backend import ReferenceBackend

    original = ReferenceBackend.init_forward_metadata

    def counting(backend, batch):
        if batch.forward_mode.is_mixed():
            print("a mixed pass", flush=True)
        return original(backend, batch)

    ReferenceBackend.init_forward_metadata = counting
"""
RETRACTING = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}

pytestmark = pytest.mark.slow  # seven servers, a quarter of an hour on two cores


def ask(url: str, prompts: list[list[int]], at_once: int = 1, *, log_probabilities: bool = True) -> list[Answer]:
    return answers.ask(url, prompts, NEW_TOKENS, at_once, log_probabilities=log_probabilities)


@pytest.fixture(scope="module")
def prompts(checkpoint) -> list[list[int]]:
    return answers.prompts_of(checkpoint.path, PROMPTS, PROMPT_TOKENS)


@pytest.fixture(scope="module")
def serve(checkpoint, tmp_path_factory):
    @contextlib.contextmanager
    def server(*words: str, environment: dict[str, str] | None = None, arguments: tuple[str, ...] | None = None
               ) -> Iterator[Node]:
        logs = tmp_path_factory.mktemp("logs")
        extra = {} if arguments is None else {"arguments": arguments}
        with nodes(checkpoint.path, [[*FLAGS, *words]], logs, environments=[environment or {}], **extra) as started:
            wait_ready(started[0], 180)
            yield started[0]

    return server


def require_batches(node: Node) -> None:
    """Many requests must have run together, or a comparison of batches says nothing."""
    running = [int(n) for n in re.findall(r"#running-req: (\d+)", node.text())]
    assert max(running) >= AT_ONCE / 2, running


@pytest.fixture(scope="module")
def alone(serve, prompts) -> tuple[list[Answer], list[Answer], list[Answer]]:
    """One server with chunks of a page: one by one with a cold cache, again with a warm one, then 16 at once."""
    with serve(*CHUNKS) as node:
        cold = ask(node.url, prompts)
        warm = ask(node.url, prompts)
        flush_cache(node.url)
        batched = ask(node.url, prompts, AT_ONCE)
        assert all(answer.cached == 0 for answer in batched)
        require_batches(node)
        return cold, warm, batched


@pytest.fixture(scope="module")
def floor(serve, prompts, alone) -> tuple[float, float, int]:
    """What relative noise of 1e-6 on keys and values does: mean and maximum, and how many texts stay equal."""
    with serve(*CHUNKS, "--kvtuner-kv-noise", str(NOISE["float32"])) as node:
        noisy = ask(node.url, prompts)
    differences = moved(alone[0], noisy)
    assert enough(differences, noisy)
    assert differences.mean() > 1e-4, "without quantized pages in view this test says nothing"
    return float(differences.mean()), float(differences.max()), texts_equal(alone[0], noisy)


@pytest.fixture
def within_the_floor(alone, floor, record_property):
    def check(name: str, found_answers: list[Answer]) -> None:
        differences = moved(alone[0], found_answers)
        assert enough(differences, found_answers)
        equal = texts_equal(alone[0], found_answers)
        found = {"floor_mean": floor[0], "floor_max": floor[1], "mean": differences.mean(), "max": differences.max(),
                 "tokens": len(differences), "texts_equal": equal}
        print(name, json.dumps({key: float(f"{value:.4g}") for key, value in found.items()}))  # noqa: T201
        record_property(name, found)
        assert differences.mean() <= 2 * floor[0]
        assert differences.max() <= 2 * floor[1]

    return check


def test_a_warm_cache_changes_nothing(alone):
    cold, warm, _ = alone
    assert all(answer.cached == 0 for answer in cold)
    assert all(answer.cached >= PAGE for answer in warm)
    assert [a.tokens for a in warm] == [a.tokens for a in cold]
    assert moved(cold, warm).max() <= SAME_SHAPES


def test_a_batch_of_sixteen(alone, within_the_floor):
    within_the_floor("batch", alone[2])


def test_whole_prompts_in_one_chunk(serve, prompts, within_the_floor):
    with serve("--chunked-prefill-size", "2048") as node:
        within_the_floor("one chunk", ask(node.url, prompts))


def test_mixed_chunks_under_the_overlap_schedule(serve, prompts, alone, floor, tmp_path):
    """SGLang mixes only requests that ask for no log-probabilities, so as many texts as under noise must be equal."""
    # A chunk of one page has no room beside a decoding request.
    flags = ("--chunked-prefill-size", str(3 * PAGE), "--enable-mixed-chunk")
    counting = other_plugin(tmp_path, COUNT_MIXED_PASSES)
    with serve(*flags, environment=counting, arguments=("--grammar-backend", "none")) as node:
        info = requests.get(f"{node.url}/server_info", timeout=20).json()
        assert info["disable_overlap_schedule"] is False
        texts = ask(node.url, prompts, AT_ONCE, log_probabilities=False)
        require_batches(node)
        mixed = node.text().count("a mixed pass")
    equal = texts_equal(alone[0], texts)
    print("mixed, overlap:", mixed, "mixed passes;", equal, "texts equal, under noise", floor[2])  # noqa: T201
    assert mixed >= PROMPTS / 2
    assert equal >= floor[2]


def test_forced_retractions(serve, prompts, within_the_floor):
    with serve(*CHUNKS, environment=RETRACTING) as node:
        retracted = ask(node.url, prompts, AT_ONCE)
        require_batches(node)
    assert sum(answer.retractions for answer in retracted) >= PROMPTS / 4
    within_the_floor("retracted", retracted)


def test_four_ranks_in_two_nodes(checkpoint, prompts, tmp_path, within_the_floor):
    words = [*FLAGS, *CHUNKS, "--tp-size", "2", "--pp-size", "2", "--nnodes", "2",
             "--dist-init-addr", f"127.0.0.1:{free_port()}", "--disable-custom-all-reduce"]
    flags = [[*words, "--node-rank", str(rank)] for rank in (0, 1)]
    with nodes(checkpoint.path, flags, tmp_path, tp=2) as started:
        wait_ready(started[0], 240)
        within_the_floor("tp2pp2", ask(started[0].url, prompts))
