"""32 requests behind kv4 on a GPU: CUDA graphs on and off, cold and warm, alone and 16 at once, kernels and torch.

bfloat16 rounds keys and values by up to 2^-9 of themselves, 2^-10 in the mean square, so the noise floor is measured
with noise of that size: the same requests on a server whose keys and values are perturbed by it before they are stored.
"""

import contextlib
import json

import pytest
import torch
from launch import nodes, wait_ready

from kvtuner_sglang.agreement import answers
from kvtuner_sglang.agreement.answers import flush_cache
from kvtuner_sglang.agreement.compare import NOISE, enough, moved, texts_equal

PROMPTS, PROMPT_TOKENS, NEW_TOKENS, PAGE, AT_ONCE = 32, 180, 24, 64, 16
FLAGS = ("--enable-kvtuner-quant", "--kvtuner-nbits-key", "4", "--kvtuner-nbits-value", "4", "--kvtuner-kv-gib", "1",
         "--max-running-requests", str(AT_ONCE), "--context-length", "2048")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def ask(url, prompts, at_once=1):
    return answers.ask(url, prompts, NEW_TOKENS, at_once)


@pytest.fixture(scope="module")
def prompts(checkpoint):
    return answers.prompts_of(checkpoint.path, PROMPTS, PROMPT_TOKENS)


@pytest.fixture(scope="module")
def serve(checkpoint, tmp_path_factory):
    @contextlib.contextmanager
    def server(*words):
        logs = tmp_path_factory.mktemp("logs")
        with nodes(checkpoint.path, [[*FLAGS, *words]], logs, arguments=(),
                   device=("--device", "cuda", "--dtype", "bfloat16")) as started:
            wait_ready(started[0], 240)
            yield started[0]

    return server


@pytest.fixture(scope="module")
def graphs(serve, prompts):
    """CUDA graphs on: cold, warm, 16 at once."""
    with serve() as node:
        cold, warm = ask(node.url, prompts), ask(node.url, prompts)
        flush_cache(node.url)
        batched = ask(node.url, prompts, AT_ONCE)
        assert "Capture" in node.text()
    return cold, warm, batched


@pytest.fixture(scope="module")
def floor(serve, prompts, graphs):
    with serve("--kvtuner-kv-noise", str(NOISE["bfloat16"])) as node:
        differences = moved(graphs[0], noisy := ask(node.url, prompts))
    assert enough(differences, noisy)
    assert differences.mean() > 1e-4
    return differences


def check(name, floor, some, others):
    differences = moved(some, others)
    assert enough(differences, others)
    found = {"floor_mean": floor.mean(), "floor_max": floor.max(), "mean": differences.mean(),
             "max": differences.max(), "tokens": len(differences), "texts_equal": texts_equal(some, others)}
    print(name, json.dumps({key: float(f"{value:.4g}") for key, value in found.items()}))  # noqa: T201
    assert differences.mean() <= 2 * floor.mean()
    assert differences.max() <= 2 * floor.max()


def test_a_warm_cache_agrees(graphs, floor):
    cold, warm, _ = graphs
    assert all(answer.cached == 0 for answer in cold)
    assert sum(answer.cached >= PAGE for answer in warm) == PROMPTS
    check("warm", floor, cold, warm)


def test_a_batch_of_sixteen_agrees(graphs, floor):
    check("batch", floor, graphs[0], graphs[2])


def test_without_cuda_graphs_the_same(serve, prompts, graphs, floor):
    """One at a time, shapes are the same: so must be the texts."""
    with serve("--disable-cuda-graph") as node:
        eager = ask(node.url, prompts)
    check("no graphs", floor, graphs[0], eager)
    assert texts_equal(graphs[0], eager) == PROMPTS


def test_chunks_of_a_page_agree(serve, prompts, graphs, floor):
    with serve("--chunked-prefill-size", str(PAGE)) as node:
        check("chunks", floor, graphs[0], ask(node.url, prompts))


def test_the_reference_in_plain_torch_agrees(serve, prompts, graphs, floor):
    with serve("--kvtuner-attention", "reference") as node:
        check("reference", floor, graphs[0], ask(node.url, prompts))
