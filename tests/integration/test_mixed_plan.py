"""A plan with another format in each pipeline stage, behind a plain launch_server. Whether it computes the same on one
rank and on four is in test_parallel_equality.py.
"""

import pytest
import requests
from launch import nodes, wait_ready

pytestmark = pytest.mark.alone
PLAN = """
model: {architecture: LlamaForCausalLM, layers: 2, kv_heads: 2, head_dim: 32}
layers:
  0: {nbits_key: 8, nbits_value: 8, axis_key: 0}
  1: {nbits_key: 2, nbits_value: 4, axis_key: 1}
provenance: {tool: written by hand}
"""
BUDGET_GIB, PAGE = 0.05, 64
# A token and kv head of 32 channels: codes, then scale and zero of keys and of values.
STAGE_BYTES = [2 * (32 + 4 + 32 + 4), 2 * (8 + 32 * 4 / PAGE + 16 + 4)]


def test_two_stages_keep_their_own_formats_and_offer_the_least_room(tiny_model, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN)
    words = ["--enable-kvtuner-quant", "--kvtuner-layer-config-file", str(plan), "--kvtuner-kv-gib", str(BUDGET_GIB),
             "--pp-size", "2", "--disable-custom-all-reduce"]
    with nodes(tiny_model, [words], tmp_path) as started:
        wait_ready(started[0], 300)
        state = requests.get(f"{started[0].url}/server_info", timeout=20).json()["kvtuner"]
        body = {"input_ids": list(range(10, 100)),
                "sampling_params": {"max_new_tokens": 40, "temperature": 0, "ignore_eos": True}}
        answer = requests.post(f"{started[0].url}/generate", json=body, timeout=60).json()
    assert answer["meta_info"]["completion_tokens"] == 40
    assert state["format"].startswith("layers 0: K 8 bit per token")
    assert [rank["bytes_per_token"] for rank in state["ranks"]] == STAGE_BYTES
    assert state["ranks"][0]["tail_bytes"] == 0 < state["ranks"][1]["tail_bytes"]
    room = min((BUDGET_GIB * 2**30 - rank["tail_bytes"]) / rank["bytes_per_token"] for rank in state["ranks"])
    assert 0.97 * room <= state["max_total_num_tokens"] <= room
