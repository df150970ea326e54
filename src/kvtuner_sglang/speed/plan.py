"""From a configuration to what one engine is started with and asked."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvtuner_sglang.config import QuantConfig, RunConfig
from kvtuner_sglang.cpu_engine.environment import cpu_server_environment
from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.measure.memory import ITEMSIZE, MIB, NVIDIA_SMI, NVIDIA_SMI_TIMEOUT_S, parse_nvidia_smi
from kvtuner_sglang.plugin.options import keywords_of
from kvtuner_sglang.quant import KVShape
from kvtuner_sglang.serving.checkpoint import Checkpoint
from kvtuner_sglang.serving.dummy_checkpoint import PREFIX as DUMMY
from kvtuner_sglang.speed.calls import Cell, SpeedSpec
from kvtuner_sglang.speed.room import request_tokens

GIB = 1 << 30
PLUGIN_BACKEND = "kvtuner"
LOG_INTERVAL = 4  # decode steps between two lines of the engine's log, which say how many requests run


def attention_backend(quant_enabled: bool, asked: str, device: str) -> str:
    """Which attention serves a format: the plugin's, or SGLang's as asked."""
    if quant_enabled:
        return PLUGIN_BACKEND
    if device == "cpu":
        return "torch_native"
    return "flashinfer" if asked == "auto" else asked


def cells_of(config: RunConfig) -> list[Cell]:
    """In the order in which they are measured: cells of one context follow each other and share prompts."""
    speed = config.speed
    cells = [Cell("ttft", 1, tokens, 0) for tokens in speed.ttft_tokens]
    cells += [Cell("ttft_cached", 1, prompt.cached + prompt.new, prompt.cached) for prompt in speed.ttft_cached]
    decode = sorted(speed.decode, key=lambda cell: (cell.context, cell.batch))
    cells += [Cell("decode", cell.batch, cell.context, cell.context) for cell in decode]
    return cells + [Cell("saturation", None, context, context) for context in speed.saturation]


def kv_dtype(quant: QuantConfig, dtype: str) -> str:
    """What an element that the plugin does not pack is kept in, `dtype` being the model's."""
    return "float8_e4m3fn" if quant.kv_cache_dtype == "fp8_e4m3" else dtype


def kv_shape(config: RunConfig, checkpoint: Checkpoint, dtype: str) -> KVShape:
    itemsize = ITEMSIZE[kv_dtype(config.quant, dtype)]
    return KVShape(checkpoint.kv_heads, checkpoint.head_dim, itemsize, page_tokens(config))


def page_tokens(config: RunConfig) -> int:
    return config.quant.page_tokens if config.quant.enabled else 1


def max_running_requests(config: RunConfig, checkpoint: Checkpoint, dtype: str, budget_bytes: float) -> int:
    """The largest batch, or at saturation no less than what the budget can hold: each slot may cost a page."""
    largest = max((cell.batch for cell in config.speed.decode), default=1)
    if not config.speed.saturation:
        return largest
    shape, plan = kv_shape(config, checkpoint, dtype), config.quant.plan(checkpoint.layers)
    tokens = request_tokens(min(config.speed.saturation), config.speed.outputs_per_request, shape.page_size)
    each = tokens * shape.bytes_per_token(plan) + shape.tail_bytes_per_slot(plan)
    return max(largest, int(budget_bytes // each) + 1)


def kv_budget_bytes(config: RunConfig, checkpoint: Checkpoint, device: str, dtype: str) -> float:
    """What keys and values can have at most: on a GPU mem_fraction_static of its memory less the weights."""
    if device == "cpu":
        return config.server.kv_gib * GIB
    done = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, check=True, timeout=NVIDIA_SMI_TIMEOUT_S)
    total_mib = parse_nvidia_smi(done.stdout)[0].total_mib or 0.0
    budget = total_mib * MIB * config.speed.mem_fraction_static - checkpoint.parameters * ITEMSIZE[dtype]
    if budget <= 0:
        raise ConfigError(f"the weights of {config.model.name} leave nothing of speed.mem_fraction_static="
                          f"{config.speed.mem_fraction_static}: raise it.")
    return budget


def engine_arguments(config: RunConfig, checkpoint: Checkpoint, device: str, dtype: str, requests: int,
                     port: int) -> dict[str, Any]:
    """Keywords of sglang.Engine; but for the format and its attention the same for every format."""
    speed, quant = config.speed, config.quant
    arguments: dict[str, Any] = {
        "model_path": str(checkpoint.path), "device": device, "dtype": dtype, "skip_tokenizer_init": True,
        "context_length": speed.context_length, "max_running_requests": requests,
        "chunked_prefill_size": speed.chunked_prefill_tokens, "sampling_backend": "pytorch",
        "random_seed": config.seed, "port": port, "log_level": "info", "decode_log_interval": LOG_INTERVAL,
    }
    if checkpoint.source.startswith(DUMMY):
        arguments["load_format"] = "dummy"
    if device == "cpu":
        arguments |= {"disable_overlap_schedule": True, "grammar_backend": "none"}
    else:
        arguments |= {"mem_fraction_static": speed.mem_fraction_static, "cuda_graph_max_bs_decode": requests}
        if not speed.prefill_cuda_graph:
            arguments["cuda_graph_backend_prefill"] = "disabled"
    if quant.page_size is not None:
        arguments["page_size"] = quant.page_size
    if not quant.enabled:
        arguments["attention_backend"] = attention_backend(False, speed.backend, device)
    if quant.kv_cache_dtype != "auto":
        arguments["kv_cache_dtype"] = quant.kv_cache_dtype
    return arguments | keywords_of(quant.options(), kvtuner_kv_gib=config.server.kv_gib if device == "cpu" else None,
                                   kvtuner_attention=config.server.attention)


def speed_spec(config: RunConfig, checkpoint: Checkpoint, arguments: dict[str, Any], folder: Path) -> SpeedSpec:
    speed = config.speed
    return SpeedSpec(
        engine=arguments, enabled=config.quant.enabled, device=arguments["device"], page_size=page_tokens(config),
        vocabulary=checkpoint.vocab_size, seed=config.seed, cells=cells_of(config), new_tokens=speed.new_tokens,
        warmups=speed.warmups, repeats=speed.repeats, ttft_repeats=speed.ttft_repeats,
        outputs_per_request=speed.outputs_per_request, log_path=str(folder / "engine.log"),
        calls_path=str(folder / "calls.jsonl"),
    )


def engine_environment(device: str) -> dict[str, str]:
    """What is added to the environment of the process."""
    added = {"SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS": "0"}
    return added | (cpu_server_environment(1, 1, 0, interface="lo") if device == "cpu" else {})


def engine_command(python: str, folder: Path) -> Sequence[str]:
    return (python, "-m", "kvtuner_sglang.speed.engine_run", str(folder / "spec.json"), str(folder / "result.json"))
