"""What /server_info must say before anything is measured: that our pool, in the format asked for, is in every rank."""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import kvtuner_sglang
from kvtuner_sglang.config import RunConfig
from kvtuner_sglang.errors import RunFailed
from kvtuner_sglang.plugin.attention_choice import choose_attention
from kvtuner_sglang.quant import KVFormat, KVShape, format_hash
from kvtuner_sglang.serving.checkpoint import Checkpoint
from kvtuner_sglang.serving.commands import Measurement

GIB = 1 << 30
PACKED_POOL = "PackedKVPool"
PLAIN_POOL = "MHATokenToKVPool"
REINSTALL = "reinstall kvtuner-sglang with the SGLang version that it names"
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}

Info = dict[str, Any]


class _Unquantized(RunFailed):
    """Quantization was asked for, and keys and values are not in our pool."""


def verify_server(info: Info, config: RunConfig, checkpoint: Checkpoint,
                  measurement: Measurement | None = None) -> Info:
    """The "kvtuner" part of /server_info; raises RunFailed, one sentence, at the first thing that is not as asked.

    The sentence begins with the rule: "unquantized_pool: " or "wrong_server: ".
    """
    try:
        return _verified(info, config, checkpoint, measurement or Measurement())
    except _Unquantized as error:
        raise RunFailed(f"unquantized_pool: {error}") from error
    except RunFailed as error:
        raise RunFailed(f"wrong_server: {error}") from error


def _verified(info: Info, config: RunConfig, checkpoint: Checkpoint, measurement: Measurement) -> Info:
    kvtuner = info.get("kvtuner")
    if not isinstance(kvtuner, dict):
        raise _Unquantized(f"/server_info has no kvtuner part, so the plugin did not load: {REINSTALL}.")
    plan = config.quant.plan(checkpoint.layers)
    try:
        _check_model(info, checkpoint)
        _check_switches(kvtuner, config, measurement)
        _check_versions("the server", kvtuner)
        _check_ranks(kvtuner["ranks"], config, checkpoint)
        _check_plan("the server", kvtuner, plan)
        for rank in kvtuner["ranks"]:
            for check in RANK_CHECKS:
                check(rank, config, plan)
    except (KeyError, TypeError) as error:
        raise RunFailed(f"/server_info is not of this version of kvtuner-sglang ({error!r}): {REINSTALL}.") from error
    return kvtuner


def _check_model(info: Info, checkpoint: Checkpoint) -> None:
    if info["model_path"] != str(checkpoint.path):
        raise RunFailed(f"the server serves {info['model_path']} but the configuration asks for {checkpoint.path}: end "
                        "the other server.")


def _check_switches(kvtuner: Info, config: RunConfig, measurement: Measurement) -> None:
    if kvtuner["enabled"] is not config.quant.enabled:
        error = _Unquantized if config.quant.enabled else RunFailed
        raise error(f"the server says that quantization is {_on(kvtuner['enabled'])} but quant={config.quant.name} "
                    f"asks for {_on(config.quant.enabled)}: {REINSTALL}.")
    logits_dir = None if measurement.logits_dir is None else str(measurement.logits_dir)
    asked = {"kv_noise": measurement.kv_noise, "logits_dir": logits_dir}
    if kvtuner["measurement"] != asked:
        raise RunFailed(f"the server runs with measurement flags {kvtuner['measurement']} instead of {asked}: "
                        "start it again.")


def _check_versions(who: str, state: Info) -> None:
    for key, package, here in (("package_version", "kvtuner-sglang", kvtuner_sglang.__version__),
                               ("sglang_version", "sglang", version("sglang"))):
        if state[key] != here:
            raise RunFailed(f"{who} runs {package} {state[key]} but this process has {here}: install the same on "
                            "every node.")


def _check_plan(who: str, state: Info, plan: Sequence[KVFormat]) -> None:
    if state["plan_hash"] != format_hash(plan):
        raise RunFailed(f"{who} stores plan {state['plan_hash']} but the configuration asks for {format_hash(plan)}: "
                        "start every node with the flags of its script.")


def _check_ranks(ranks: list[Info], config: RunConfig, checkpoint: Checkpoint) -> None:
    dist = config.dist
    named = sorted(r["rank"] for r in ranks)
    if named != list(range(dist.ranks)):
        raise RunFailed(f"/server_info names ranks {named} where tp={dist.tp} x pp={dist.pp} makes {dist.ranks}: "
                        "start every node.")
    nodes = {r["node_rank"] for r in ranks}
    if nodes != set(range(dist.nnodes)):
        raise RunFailed(f"the ranks are on {len(nodes)} nodes instead of {dist.nnodes}: start every node.")
    layers = sorted((r["tp_rank"], *r["layers"]) for r in ranks)
    for tp_rank in range(dist.tp):
        spans = [(begin, end) for tp, begin, end in layers if tp == tp_rank]
        joined = all(a[1] == b[0] for a, b in pairwise(spans))
        if not (spans and spans[0][0] == 0 and joined and spans[-1][1] == checkpoint.layers):
            raise RunFailed(f"tensor-parallel rank {tp_rank} holds layers {spans} of {checkpoint.layers}: start every "
                            "node with the flags of its script.")


def _check_pool(rank: Info, config: RunConfig, plan: Sequence[KVFormat]) -> None:
    wanted = PACKED_POOL if config.quant.enabled else PLAIN_POOL
    if rank["pool_class"] != wanted or rank["enabled"] is not config.quant.enabled:
        error = _Unquantized if config.quant.enabled else RunFailed
        raise error(f"{_name(rank)} keeps its keys and values in {rank['pool_class']} instead of {wanted}: "
                    f"{REINSTALL}.")
    attention = choose_attention(config.server.attention, rank["device"].startswith("cpu"))
    if config.quant.enabled and not rank["attention"].startswith(attention):
        raise RunFailed(f"{_name(rank)} serves by {rank['attention']} attention instead of {attention}: start every "
                        "node with the flags of its script.")
    if config.quant.enabled and rank["page_size"] != config.quant.page_tokens:
        raise RunFailed(f"{_name(rank)} has pages of {rank['page_size']} tokens instead of {config.quant.page_tokens}: "
                        "start every node with the flags of its script.")


def _check_rank_plan(rank: Info, config: RunConfig, plan: Sequence[KVFormat]) -> None:
    _check_plan(_name(rank), rank, plan)
    _check_versions(_name(rank), rank)


def _check_bytes(rank: Info, config: RunConfig, plan: Sequence[KVFormat]) -> None:
    budget = config.server.kv_gib * GIB
    if rank["kv_gib"] != config.server.kv_gib:
        raise RunFailed(f"{_name(rank)} was given {rank['kv_gib']} GiB for keys and values instead of "
                        f"{config.server.kv_gib}: start every node with the flags of its script.")
    fp8 = config.quant.kv_cache_dtype == "fp8_e4m3"
    if (rank["dtype"] == "float8_e4m3fn") is not fp8:
        raise RunFailed(f"{_name(rank)} keeps {rank['dtype']} numbers but quant={config.quant.name} asks for "
                        f"kv_cache_dtype={config.quant.kv_cache_dtype}: start every node with the flags of its script.")
    shape = KVShape(rank["kv_heads"], rank["head_dim"], ITEMSIZE[rank["dtype"]], rank["page_size"])
    formula = shape.bytes_per_token(plan[slice(*rank["layers"])])
    if rank["bytes_per_token"] != formula:
        raise RunFailed(f"{_name(rank)} says that a token takes {rank['bytes_per_token']} bytes where its format takes "
                        f"{formula}: {REINSTALL}.")
    padding = formula * rank["page_size"]
    allocated = rank["pool_bytes"] + rank["tail_bytes"]
    if allocated > budget + padding:
        raise RunFailed(f"{_name(rank)} allocated {allocated / GIB:.4f} GiB for keys and values, over its budget of "
                        f"{config.server.kv_gib}: a full-precision copy was kept, so {REINSTALL}.")
    if not 0 <= rank["pool_bytes"] - formula * rank["tokens"] <= 2 * padding:
        raise RunFailed(f"{_name(rank)} holds {rank['tokens']} tokens in {rank['pool_bytes']} bytes where its format "
                        f"takes {formula * rank['tokens']:.0f}: {REINSTALL}.")


RANK_CHECKS: tuple[Callable[[Info, RunConfig, Sequence[KVFormat]], None], ...] = (
    _check_pool, _check_rank_plan, _check_bytes,
)


def _name(rank: Info) -> str:
    return f"rank {rank['rank']} on node {rank['node_rank']}"


def _on(enabled: object) -> str:
    return "on" if enabled else "off"
