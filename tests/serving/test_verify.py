"""verify_server is fed every lie that a server could tell about its pool."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

import kvtuner_sglang
from kvtuner_sglang.config import RunConfig
from kvtuner_sglang.errors import RunFailed
from kvtuner_sglang.quant import KVShape, format_hash
from kvtuner_sglang.serving.verify import GIB, verify_server

LAYERS = 30


def truth(config: RunConfig) -> dict[str, Any]:
    """What an honest server of `config` shows for SmolLM2's shape, fp32."""
    dist, plan = config.dist, config.quant.plan(LAYERS)
    ranks = []
    for rank in range(dist.ranks):
        pp_rank, tp_rank = divmod(rank, dist.tp)
        layers = [pp_rank * LAYERS // dist.pp, (pp_rank + 1) * LAYERS // dist.pp]
        page = config.quant.page_tokens
        dtype, itemsize = ("float8_e4m3fn", 1) if config.quant.name == "fp8" else ("float32", 4)
        per_token = KVShape(2, 64, itemsize, page).bytes_per_token(plan[slice(*layers)])
        tokens = (int(config.server.kv_gib * GIB // (per_token * page)) - 1) * page
        ranks.append({
            "rank": rank, "tp_rank": tp_rank, "pp_rank": pp_rank, "node_rank": rank * dist.nnodes // dist.ranks,
            "pid": 100 + rank, "device": "cpu", "attention": "reference",
            "pool_class": "PackedKVPool" if config.quant.enabled else "MHATokenToKVPool",
            "layers": layers, "kv_heads": 2, "head_dim": 64, "dtype": dtype, "page_size": page, "tokens": tokens,
            "pool_bytes": int(per_token * (tokens + page)), "tail_bytes": 0, "bytes_per_token": per_token,
            "enabled": config.quant.enabled, "plan_hash": format_hash(plan), "kv_gib": config.server.kv_gib,
            "package_version": kvtuner_sglang.__version__, "sglang_version": "0.5.17",
        })
    shared = ("enabled", "plan_hash", "kv_gib", "package_version", "sglang_version")
    return {"kvtuner": {**{k: ranks[0][k] for k in shared}, "ranks": ranks,
                        "measurement": {"kv_noise": 0.0, "logits_dir": None}}}


def last(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """A lie that only the last rank tells."""
    return lambda k: k["ranks"][-1].update(changes)


def scaled(name: str, factor: float) -> Callable[[dict[str, Any]], None]:
    return lambda k: k["ranks"][-1].update({name: k["ranks"][-1][name] * factor})


LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "quantization is off": (lambda k: k.update(enabled=False), "quantization is off but quant=kv4"),
    "another plan": (lambda k: k.update(plan_hash="0" * 12), "the server stores plan 000000000000"),
    "another package": (lambda k: k.update(package_version="9.9"), r"the server runs kvtuner-sglang 9\.9"),
    "noise left on": (lambda k: k["measurement"].update(kv_noise=1e-6), "measurement flags"),
    "logits still written": (lambda k: k["measurement"].update(logits_dir="/x"), "measurement flags"),
    "a rank is missing": (lambda k: k["ranks"].pop(), r"names ranks \[0, 1, 2\] where tp=2 x pp=2 makes 4"),
    "a rank twice": (last(rank=2), r"names ranks \[0, 1, 2, 2\]"),
    "all on one node": (lambda k: [r.update(node_rank=0) for r in k["ranks"]], "on 1 nodes instead of 2"),
    "a layer left out": (last(layers=[16, 30]), "tensor-parallel rank 1 holds layers"),
    "the last layer left out": (last(layers=[15, 29]), "tensor-parallel rank 1 holds layers"),
    "another page": (last(page_size=128), "rank 3 on node 1 has pages of 128 tokens instead of 64"),
    "SGLang's own pool": (last(pool_class="MHATokenToKVPool"), "rank 3 on node 1 keeps its keys and values in MHA"),
    "one rank off": (last(enabled=False), "rank 3 on node 1 keeps"),
    "one rank another plan": (last(plan_hash="1" * 12), "rank 3 on node 1 stores plan 111111111111"),
    "one rank another SGLang": (last(sglang_version="0.5.16"), r"rank 3 on node 1 runs sglang 0\.5\.16"),
    "one rank another package": (last(package_version="0.0.1"), r"rank 3 on node 1 runs kvtuner-sglang 0\.0\.1"),
    "another budget": (last(kv_gib=8.0), r"rank 3 on node 1 was given 8\.0 GiB"),
    "bytes per token of full precision": (last(bytes_per_token=15360.0), r"a token takes 15360\.0 bytes where"),
    "a full-precision copy": (scaled("pool_bytes", 2), "over its budget"),
    "large tails": (last(tail_bytes=10**9), "over its budget"),
    "fewer bytes than tokens need": (scaled("pool_bytes", 0.5), "holds .* tokens in .* bytes"),
    "far fewer tokens than bytes hold": (scaled("tokens", 0.5), "holds .* tokens in .* bytes"),
    "another attention": (last(attention="fused"), "rank 3 on node 1 serves by fused attention instead of reference"),
    "a field is missing": (lambda k: k["ranks"][-1].pop("pool_class"), "not of this version"),
    "no ranks": (lambda k: k.pop("ranks"), "not of this version"),
}


@pytest.mark.parametrize("quant", ["bf16", "fp8", "kv8", "kv4", "kv2", "k8v4_token"])
@pytest.mark.parametrize("dist", ["single", "tp2", "pp2", "tp2pp2"])
def test_the_truth_passes(compose, checkpoint_shape, quant: str, dist: str) -> None:
    config = compose(f"quant={quant}", f"dist={dist}")
    info = truth(config)
    assert verify_server(info, config, checkpoint_shape) is info["kvtuner"]


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_one_sentence(compose, checkpoint_shape, lie: str) -> None:
    config = compose("quant=kv4", "dist=tp2pp2")
    info = copy.deepcopy(truth(config))
    tell, sentence = LIES[lie]
    tell(info["kvtuner"])
    with pytest.raises(RunFailed, match=sentence) as caught:
        verify_server(info, config, checkpoint_shape)
    assert "\n" not in str(caught.value)


def test_a_server_without_the_plugin(compose, checkpoint_shape) -> None:
    with pytest.raises(RunFailed, match="has no kvtuner part"):
        verify_server({"version": "0.5.17"}, compose("quant=kv4"), checkpoint_shape)


def test_full_precision_must_be_full_precision(compose, checkpoint_shape) -> None:
    with pytest.raises(RunFailed, match="quantization is on but quant=bf16"):
        verify_server(truth(compose("quant=kv4")), compose("quant=bf16"), checkpoint_shape)


@pytest.mark.parametrize(("served", "asked"), [("bf16", "fp8"), ("fp8", "bf16")])
def test_eight_bits_of_sglangs_own_are_told_from_full_precision(compose, checkpoint_shape, served, asked) -> None:
    with pytest.raises(RunFailed, match=f"quant={asked} asks for"):
        verify_server(truth(compose(f"quant={served}")), compose(f"quant={asked}"), checkpoint_shape)
