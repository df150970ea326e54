"""What the check at the end of every start does to servers that ask nothing of the plugin."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from torch.distributed import HashStore

import kvtuner_sglang
from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.plugin import sizing, startup_check
from kvtuner_sglang.plugin.options import KvtunerOptions

SIZE = {"size": 64, "page_size": 1, "dtype": torch.bfloat16, "layer_num": 2, "device": "cpu",
        "enable_memory_saver": False}


def scheduler_with(pool: object, options: KvtunerOptions) -> SimpleNamespace:
    args = SimpleNamespace(_kvtuner=options, attention_backend="torch_native", device="cpu", node_rank=0, page_size=1)
    return SimpleNamespace(
        server_args=args, token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
        model_config=SimpleNamespace(num_hidden_layers=2), max_total_num_tokens=64,
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(attn_backend=None)),
        ps=SimpleNamespace(tp_rank=0, pp_rank=0))


@pytest.fixture
def no_other_rank(monkeypatch):
    """Rank 0 of two, the other without the plugin: whoever waits for it fails."""
    monkeypatch.setattr(startup_check.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(startup_check.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(startup_check, "_store", lambda: pytest.fail("a rank waits for others"))


@pytest.mark.usefixtures("no_other_rank")
@pytest.mark.parametrize("options", [KvtunerOptions(), KvtunerOptions(kvtuner_kv_gib=1)])
def test_a_pool_that_is_not_sglangs_plain_one_is_left_alone(options):
    pool = MLATokenToKVPool(kv_lora_rank=32, qk_rope_head_dim=16, **SIZE)
    assert startup_check.after_get_init_info({"x": 1}, scheduler_with(pool, options)) == {"x": 1}


@pytest.mark.usefixtures("no_other_rank")
def test_a_plain_pool_is_shown_without_waiting_for_ranks_that_may_lack_the_plugin():
    scheduler = scheduler_with(MHATokenToKVPool(head_num=2, head_dim=64, **SIZE), KvtunerOptions())
    state = startup_check.after_get_init_info({}, scheduler)["kvtuner"]
    (rank,) = state["ranks"]
    assert (rank["pool_class"], rank["dtype"], rank["attention"]) == ("MHATokenToKVPool", "bfloat16", "torch_native")
    assert not state["enabled"]


@pytest.mark.parametrize("options", [KvtunerOptions(kvtuner_kv_gib=1), KvtunerOptions(enable_kvtuner_quant=True)])
def test_what_was_asked_of_the_plugin_is_compared_over_all_ranks(options, monkeypatch):
    scheduler = scheduler_with(MHATokenToKVPool(head_num=2, head_dim=64, **SIZE), options)
    states = [{"rank": 0, **dict.fromkeys(startup_check.SAME_ON_ALL_RANKS, 1)},
              {"rank": 1, "node_rank": 1, **dict.fromkeys(startup_check.SAME_ON_ALL_RANKS, 2)}]
    monkeypatch.setattr(startup_check, "rank_state", lambda scheduler: states[0])
    monkeypatch.setattr(startup_check, "_gather", lambda state: states)
    monkeypatch.setattr(startup_check, "refusing_in_one_sentence", nullcontext)  # it ends the launcher
    with pytest.raises(ConfigError, match="rank 1 on node 1 has enabled 2 but rank 0 has 1"):
        startup_check.after_get_init_info({}, scheduler)


@pytest.fixture
def announced(monkeypatch):
    """announced(options, ...): the ranks of one start, each on a node of its own, say what they were asked for.

    An option of None is a rank without the plugin.  How it goes over real processes is in tests/integration.
    """
    store = HashStore()
    monkeypatch.setattr(startup_check, "_store", lambda: store)

    def announce(*options, versions=("1", "1")):
        monkeypatch.setattr(startup_check.dist, "get_world_size", lambda: len(options))
        for rank, (asked, version) in enumerate(zip(options, versions, strict=True)):
            monkeypatch.setattr(startup_check.dist, "get_rank", lambda rank=rank: rank)
            monkeypatch.setattr(kvtuner_sglang, "__version__", version)
            if asked is not None:
                args = SimpleNamespace(_kvtuner=asked, node_rank=rank, page_size=64, device="cuda")
                startup_check.announce(SimpleNamespace(server_args=args,
                                                       model_config=SimpleNamespace(num_hidden_layers=2)))
        startup_check.compare_announcements()

    return announce


KV4, KV8 = (KvtunerOptions(enable_kvtuner_quant=True, kvtuner_nbits_key=bits, kvtuner_nbits_value=4,
                           kvtuner_kv_gib=1) for bits in (4, 8))


@pytest.mark.parametrize(("other", "version", "sentence"), [
    (KV8, "1", "has plan_hash '.*' but rank 0 has"), (KvtunerOptions(kvtuner_kv_gib=1), "1", "has enabled False"),
    (replace(KV4, kvtuner_kv_gib=2), "1", "has kv_gib 2"), (KV4, "0.0.9", "has package_version '0.0.9'"),
    (replace(KV4, kvtuner_attention="reference"), "1", "has attention_asked 'reference'"),
    (None, "1", "rank 1 runs without kvtuner-sglang: install"),
])
def test_ranks_that_were_asked_for_different_things_do_not_start(announced, other, version, sentence):
    with pytest.raises(ConfigError, match=sentence):
        announced(KV4, other, versions=("1", version))


def test_ranks_that_were_asked_for_the_same_start(announced):
    announced(KV4, KV4)


def test_quantization_with_another_pool_stops():
    scheduler = scheduler_with(MHATokenToKVPool(head_num=2, head_dim=64, **SIZE),
                               KvtunerOptions(enable_kvtuner_quant=True))
    with pytest.raises(ConfigError, match="the pool is MHATokenToKVPool"):
        startup_check.rank_state(scheduler)


def test_a_checkpoint_that_brings_an_fp8_cache_is_not_packed():
    kvc = SimpleNamespace(server_args=SimpleNamespace(_kvtuner=KvtunerOptions(enable_kvtuner_quant=True)),
                          device="cpu", kv_cache_dtype=torch.float8_e4m3fn, model_dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"a KV cache of torch\.float8_e4m3fn beside a model of torch\.bfloat16"):
        sizing.around_build_mha_kv_pool(lambda *_, **__: pytest.fail("a pool was built"), kvc, mha_pool_class=None)
