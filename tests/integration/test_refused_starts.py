"""Starts that must stop by themselves: one sentence, a non-zero exit, no process left."""

import os
import time
from pathlib import Path

import pytest
import requests
from launch import free_port, nodes, other_plugin, wait_ended, wait_ready

pytestmark = pytest.mark.alone
QUANTIZED = [
    "--enable-kvtuner-quant",
    "--kvtuner-nbits-key",
    "4",
    "--kvtuner-nbits-value",
    "4",
    "--kvtuner-kv-gib",
    "0.05",
]
SAID_S = 180  # they need half a minute of an idle machine; a start that is not refused goes on for ever
ENDED_S = 60  # from the sentence to the last process's end


def two_nodes(port: int, *words: str, rank: int) -> list[str]:
    return [
        "--pp-size",
        "2",
        "--nnodes",
        "2",
        "--node-rank",
        str(rank),
        "--dist-init-addr",
        f"127.0.0.1:{port}",
        *words,
    ]


def assert_refused(started, *parts: str) -> None:
    def said() -> list[str]:
        return [line for node in started for line in node.sentences()]

    def refused() -> bool:
        return all(any(part in line for line in said()) for part in parts)

    deadline = time.monotonic() + SAID_S
    while not refused() and any(node.process.poll() is None for node in started) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert refused(), said() or started[0].text()[-3000:]
    codes = wait_ended(started, ENDED_S)
    assert all(code != 0 for code in codes), codes


def test_a_feature_of_sglang_that_no_test_covers(tiny_model, tmp_path):
    """One of those that tests/plugin/test_arguments.py lists."""
    with nodes(tiny_model, [[*QUANTIZED, "--enable-hierarchical-cache"]], tmp_path) as started:
        assert_refused(started, "--enable-hierarchical-cache")


def test_a_plan_of_another_model(tiny_model, tmp_path):
    words = ["--enable-kvtuner-quant", "--kvtuner-layer-config-file", "preset:qwen2_5_7b_per_token_4_00"]
    with nodes(tiny_model, [words], tmp_path) as started:
        assert_refused(started, "Qwen2ForCausalLM", "choose a plan made for this model")


def plugin_without(hook: str, folder: Path) -> dict[str, str]:
    """An installed plugin that is ours but for one hook, and the environment that makes SGLang load it instead."""
    return other_plugin(folder, f"""
    kept = tuple(h for h in entry.HOOKS if {hook!r} not in h[0])
    assert len(kept) == len(entry.HOOKS) - 1
    entry.HOOKS = kept
""")


@pytest.mark.parametrize(
    ("hook", "sentence"),
    [
        ("_build_mha_kv_pool", "MHATokenToKVPool"),
        ("calculate_pool_sizes", "the byte budget"),
    ],
)
def test_a_hook_that_did_not_take(tiny_model, tmp_path, hook, sentence):
    environment = plugin_without(hook, tmp_path)
    with nodes(tiny_model, [QUANTIZED], tmp_path, environments=[environment]) as started:
        assert_refused(started, sentence)


@pytest.mark.parametrize(
    ("other", "environment", "sentence"),
    [
        (["--kvtuner-kv-gib", "0.05"], {}, "enabled"),
        ([], {"SGLANG_PLUGINS": "none"}, "install kvtuner-sglang"),
    ],
)
def test_nodes_that_differ(tiny_model, tmp_path, other, environment, sentence):
    """In what else they can differ is in tests/plugin/test_startup_check.py."""
    port = free_port()
    flags = [two_nodes(port, *QUANTIZED, rank=0), two_nodes(port, *other, rank=1)]
    with nodes(tiny_model, flags, tmp_path, environments=[{}, environment]) as started:
        assert_refused(started, sentence)


def test_the_seeds_launch_lines_serve_quantized(tiny_model, tmp_path):
    """The seed's two lines; changed are model path, addresses, and what --device cpu needs."""
    seed = [
        "--tp-size",
        "2",
        "--pp-size",
        "2",
        "--nnodes",
        "2",
        "--dist-init-addr",
        f"127.0.0.1:{free_port()}",
        "--enable-kvtuner-quant",
        "--kvtuner-nbits-key",
        "4",
        "--kvtuner-nbits-value",
        "4",
        "--dist-timeout",
        "300",
        "--disable-custom-all-reduce",
    ]
    flags = [[*seed, "--node-rank", "0"], [*seed, "--node-rank", "1"]]
    with nodes(tiny_model, flags, tmp_path, tp=2) as started:
        wait_ready(started[0], 300)
        state = requests.get(f"{started[0].url}/server_info", timeout=20).json()["kvtuner"]
        assert [rank["pool_class"] for rank in state["ranks"]] == ["PackedKVPool"] * 4
        assert [rank["node_rank"] for rank in state["ranks"]] == [0, 0, 1, 1]
        body = {"text": "Hello", "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}}
        answer = requests.post(f"{started[0].url}/generate", json=body, timeout=60)
        assert answer.status_code == 200
        assert answer.json()["meta_info"]["completion_tokens"] == 4


def test_false_serves_full_precision(tiny_model, tmp_path):
    with nodes(tiny_model, [["--enable-kvtuner-quant=False", "--kvtuner-kv-gib", "0.05"]], tmp_path) as started:
        wait_ready(started[0], 300)
        state = requests.get(f"{started[0].url}/server_info", timeout=20).json()["kvtuner"]
        assert not state["enabled"]
        (rank,) = state["ranks"]
        assert rank["pool_class"] == "MHATokenToKVPool"
        assert rank["bytes_per_token"] == rank["bytes_per_token_full"]
        assert rank["pool_bytes"] <= 0.05 * 2**30


def test_nothing_of_this_survives():
    """The launchers above are gone: this process has no live children."""
    import psutil

    assert [p for p in psutil.Process(os.getpid()).children() if "launch_server" in " ".join(p.cmdline())] == []
