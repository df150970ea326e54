"""verify_server is fed every lie that a server could tell about its pool."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from kvtuner_sglang.errors import RunFailed
from kvtuner_sglang.serving.verify import verify_server
from served_info import truth


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
RULE_OF = dict.fromkeys(("quantization is off", "SGLang's own pool", "one rank off"), "unquantized_pool")


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
    with pytest.raises(RunFailed, match=rf"^{RULE_OF.get(lie, 'wrong_server')}: .*{sentence}") as caught:
        verify_server(info, config, checkpoint_shape)
    assert "\n" not in str(caught.value)


def test_a_server_without_the_plugin(compose, checkpoint_shape) -> None:
    with pytest.raises(RunFailed, match=r"^unquantized_pool: .*has no kvtuner part"):
        verify_server({"version": "0.5.17"}, compose("quant=kv4"), checkpoint_shape)


def test_a_server_of_another_model(compose, checkpoint_shape) -> None:
    config = compose("quant=kv4")
    with pytest.raises(RunFailed, match=r"^wrong_server: the server serves /other .* asks for /no/checkpoint"):
        verify_server(truth(config, model_path="/other"), config, checkpoint_shape)


def test_full_precision_must_be_full_precision(compose, checkpoint_shape) -> None:
    with pytest.raises(RunFailed, match=r"^wrong_server: .*quantization is on but quant=bf16"):
        verify_server(truth(compose("quant=kv4")), compose("quant=bf16"), checkpoint_shape)


@pytest.mark.parametrize(("served", "asked"), [("bf16", "fp8"), ("fp8", "bf16")])
def test_eight_bits_of_sglangs_own_are_told_from_full_precision(compose, checkpoint_shape, served, asked) -> None:
    with pytest.raises(RunFailed, match=f"quant={asked} asks for"):
        verify_server(truth(compose(f"quant={served}")), compose(f"quant={asked}"), checkpoint_shape)
