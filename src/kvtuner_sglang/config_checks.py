"""What must fit together in a configuration, where one field alone cannot tell."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.load.config import ROUNDS, CapacityLoad, ClosedLoad, LoadWorkload, MultiturnLoad

if TYPE_CHECKING:
    from kvtuner_sglang.config import QuantConfig, RunConfig

# Groups and options that belong to some tasks alone, and which of them a task reads; all others are everybody's.
OWNED = ("model", "quant", "plan", "dist", "server", "workload", "quality", "kernels", "speed", "tune", "agreement")
_FORMAT = ("model", "quant", "plan")
_PROBE = ("quality.probe", "quality.probe_tokens", "quality.probe_bound")
_ENGINE = ("dist", "server.device", "server.attention")
READ_BY = {
    "serve": (*_FORMAT, "dist", "server", "workload", *_PROBE),
    "forensics": (*_FORMAT, "dist", "server", "workload", *_PROBE),
    "quality": (*_FORMAT, *_ENGINE, "server.chunked_prefill_tokens", "quality"),
    "speed": (*_FORMAT, *_ENGINE, "server.kv_gib", "speed"),
    "agreement": (*_FORMAT, "dist", "server", "agreement"),
    "probe": (*_FORMAT, *_PROBE, "server.device"),
    "tune": ("model", "tune", "server.device"),
    "kernels": ("kernels",),
    "claims": (), "figures": (), "paper": (),
}


def check_given(task: str, given: Mapping[str, str]) -> None:
    """Raises ConfigError at what a user gave, {group or option: the word}, and this task would leave unread."""
    for key, word in given.items():
        if key.partition(".")[0] in OWNED and not any(f"{key}.".startswith(f"{read}.") for read in READ_BY[task]):
            raise ConfigError(f"task={task} does not read {word}: leave it out, or choose a task that does.")


def check(config: "RunConfig") -> None:
    """Everything that needs more than one field; raises ConfigError."""
    dist, quant, server = config.dist, config.quant, config.server
    if dist.ranks % dist.nnodes:
        raise ConfigError(
            f"tp={dist.tp} x pp={dist.pp} ranks cannot be shared by {dist.nnodes} nodes: "
            "choose a dist whose nnodes divides tp * pp."
        )
    for name, values in (("hosts", dist.hosts), ("http_ports", dist.http_ports)):
        if len(values) != dist.nnodes:
            raise ConfigError(f"dist.{name} has {len(values)} entries for {dist.nnodes} nodes: give one per node.")
    if config.plan.path is not None and quant.plan_path is None:
        raise ConfigError("plan.path is for quant=plan: give that, or leave plan.path out.")
    if quant.enabled:
        _check_bits(quant)
        if config.quality.probe_tokens < 2 * quant.page_tokens:
            raise ConfigError(f"quality.probe_tokens={config.quality.probe_tokens} reads too little as stored with "
                              f"pages of {quant.page_tokens}: give {4 * quant.page_tokens} or more.")
    else:
        for name, value in (("page_size", quant.page_size), ("key_boost", quant.key_boost)):
            if value is not None:
                raise ConfigError(f"quant={quant.name} stores keys and values as they are: leave quant.{name}={value} "
                                  "out.")
    if config.quality.window_tokens >= config.quality.context_length:
        raise ConfigError(f"quality.window_tokens={config.quality.window_tokens} does not fit "
                          f"quality.context_length={config.quality.context_length}: make the window shorter.")
    if config.task in ("quality", "speed") and dist.ranks > 1:
        raise ConfigError(f"task={config.task} measures on one rank: choose dist=single.")
    if config.task == "forensics" and dist.nnodes < 2:
        raise ConfigError(f"task=forensics asks the second of two nodes and dist={dist.name} has one: choose "
                          "dist=tp2pp2.")
    if config.task == "forensics" and config.workload.kind != "seed_tests":
        raise ConfigError(f"task=forensics repeats the seed's tests and workload={config.workload.name} is a load: "
                          "choose workload=seed_report.")
    if config.report.language != "en" and config.task != "serve":
        raise ConfigError(f"report.language={config.report.language} is of the report of task=serve, which task="
                          f"{config.task} does not write: leave it out.")
    _check_speed(config)
    _check_agreement(config)
    if config.workload.kind != "seed_tests":
        _check_load(config.workload, quant.page_tokens)
    longest = config.workload.longest
    if longest + 8 > server.context_length:
        raise ConfigError(
            f"workload {config.workload.name} needs {longest} tokens but server.context_length is "
            f"{server.context_length}: raise it or choose a shorter workload."
        )


def _check_load(load: LoadWorkload, page_tokens: int) -> None:
    """What fits together in a load workload."""
    if isinstance(load, ClosedLoad) and load.requests < ROUNDS * max(load.concurrency):
        raise ConfigError(f"workload {load.name}: {load.requests} requests are less than {ROUNDS} for each of "
                          f"{max(load.concurrency)} workers, so their idling could not be seen: give more.")
    if isinstance(load, MultiturnLoad) and load.requests < max(load.concurrency):
        raise ConfigError(f"workload {load.name}: {load.requests} conversations never reach concurrency "
                          f"{max(load.concurrency)}: give as many.")
    if isinstance(load, CapacityLoad) and list(load.rates_per_s) != sorted(set(load.rates_per_s)):
        raise ConfigError(f"workload.rates_per_s={list(load.rates_per_s)} cannot be bisected: give ascending rates.")
    if not isinstance(load, MultiturnLoad):
        if load.shared >= load.prompt_tokens:
            raise ConfigError(f"workload.shared_tokens={load.shared_tokens} leaves nothing of prompts of "
                              f"{load.prompt_tokens} tokens: give fewer.")
        if (load.shared_tokens > 0) != (load.cache == "shared_prefix"):
            raise ConfigError(f"workload.cache={load.cache} with workload.shared_tokens={load.shared_tokens}: prompts "
                              "share tokens with cache=shared_prefix, and only then.")
        reused = load.shared if load.shared else load.prompt_tokens - 1
        if load.cache != "cold" and reused < page_tokens:
            raise ConfigError(f"workload.cache={load.cache} reuses {reused} tokens, less than a page of {page_tokens}, "
                              "so nothing would be cached: make the prompts longer.")


def _check_bits(quant: "QuantConfig") -> None:
    if quant.plan_path is None and (quant.nbits_key is None or quant.nbits_value is None):
        raise ConfigError(f"quant={quant.name} does not say how many bits: give plan.path=FILE or "
                          "plan.path=preset:NAME.")
    if quant.plan_path is not None and not (quant.nbits_key is None and quant.nbits_value is None):
        raise ConfigError("plan.path says the bits of every layer: leave quant.nbits_key and quant.nbits_value out.")
    if not any(fmt.quantized for fmt in quant.any_formats()):
        raise ConfigError("16-bit keys and values are not quantized: use quant=bf16 instead.")


def _check_speed(config: "RunConfig") -> None:
    """What fits task=speed, and what fits no other task."""
    quant, speed = config.quant, config.speed
    if config.task != "speed":
        if config.task != "serve" and config.model.source.startswith("dummy:"):
            raise ConfigError(f"model={config.model.name} has random weights, so only task=speed and task=serve can "
                              "use it.")
        if config.task != "serve" and quant.kv_cache_dtype != "auto":
            raise ConfigError(f"quant={quant.name} is SGLang's own cache, which only task=speed and task=serve measure "
                              "as a peer.")
        return
    if quant.enabled and (quant.kv_cache_dtype != "auto" or speed.backend != "auto"):
        raise ConfigError(f"quant={quant.name} is served by the plugin's own attention: leave "
                          "speed.backend and quant.kv_cache_dtype at auto.")
    first, second = speed.new_tokens
    if first < 2 or second < 2 * first:
        raise ConfigError(f"speed.new_tokens=[{first}, {second}] says little about decoding: give two lengths from 2 "
                          "up, the second at least twice the first.")
    if speed.longest > speed.context_length:
        raise ConfigError(f"speed={speed.name} needs {speed.longest} tokens but speed.context_length is "
                          f"{speed.context_length}: raise it or choose shorter cells.")
    if not (speed.decode or speed.saturation or speed.ttft_tokens or speed.ttft_cached):
        raise ConfigError(f"speed={speed.name} measures nothing: give speed.decode or speed.ttft_tokens.")


def _check_agreement(config: "RunConfig") -> None:
    if config.task != "agreement":
        return
    agreement = config.agreement
    if config.dist.ranks > 1:
        raise ConfigError("task=agreement compares with one rank: choose dist=single and name layouts in "
                          "agreement.dists.")
    if not agreement.dists or not set(agreement.dists) <= set(agreement.layouts):
        raise ConfigError(f"agreement.dists={list(agreement.dists)} must name some of {', '.join(agreement.layouts)}.")
    page = config.quant.page_tokens
    if agreement.prompt_tokens <= page:
        raise ConfigError(f"agreement.prompt_tokens={agreement.prompt_tokens} fills no page of {page} that a later "
                          f"token would read as stored, so nothing would be compared: give {2 * page + 1} or more.")
    longest = agreement.prompt_tokens + agreement.new_tokens
    if longest + 8 > config.server.context_length:
        raise ConfigError(f"agreement needs {longest} tokens but server.context_length is "
                          f"{config.server.context_length}: raise it or choose shorter prompts.")
