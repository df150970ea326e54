"""What SGLang arguments may stand beside quantization: an allow-list, applied before SGLang resolves its defaults."""

import contextvars
import dataclasses
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch

from kvtuner_sglang.errors import ConfigError, UserError
from kvtuner_sglang.plugin.attention_choice import (
    choose_attention,
    refuse_old_gpus,
    refuse_other_devices,
    refuse_without_kernels,
)
from kvtuner_sglang.plugin.options import KvtunerOptions, options_from_namespace, pop_options
from kvtuner_sglang.quant import ModelIdentity

logger = logging.getLogger(__name__)

BACKEND = "kvtuner"
SUPPORTED_SGLANG = ("0.5.17",)
SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM")
CPU_MAX_RUNNING_REQUESTS = 8
CUDA_MAX_RUNNING_REQUESTS = 64
GRAPH_ARGUMENTS = ("cuda_graph_backend_decode", "cuda_graph_backend_prefill")
# Arguments that a test serves quantized with, or that never come near keys and values.
ALLOWED_ARGUMENTS = frozenset((
    "model_path", "tokenizer_path", "tokenizer_mode", "load_format", "trust_remote_code", "served_model_name",
    "revision", "host", "port", "api_key", "log_level", "log_level_http", "log_requests", "log_requests_level",
    "show_time_cost", "enable_metrics", "tp_size", "pp_size", "nnodes", "node_rank", "dist_init_addr", "dist_timeout",
    "base_gpu_id", "gpu_id_step", "device", "dtype", "context_length", "mem_fraction_static", "max_running_requests",
    "max_total_tokens", "chunked_prefill_size", "max_prefill_tokens", "schedule_policy", "schedule_conservativeness",
    "random_seed", "stream_interval", "watchdog_timeout", "soft_watchdog_timeout", "decode_log_interval",
    "skip_server_warmup", "warmups", "disable_custom_all_reduce", "disable_overlap_schedule", "disable_radix_cache",
    "grammar_backend", "sampling_backend", "attention_backend", "page_size", "disable_cuda_graph",
    "enable_mixed_chunk", "cuda_graph_max_bs_decode", "skip_tokenizer_init",
))

_from_cli: contextvars.ContextVar[KvtunerOptions | None] = contextvars.ContextVar("kvtuner_options", default=None)
_broken_targets: list[str] = []


def note_broken_target(target: str) -> None:
    """A function that the plugin must hook does not exist in this SGLang: enabling quantization will refuse."""
    _broken_targets.append(target)


def around_from_cli_args(original: Callable[..., Any], cls: type, args: Any) -> Any:
    """Carry our flags over the conversion to ServerArgs, which drops what is not SGLang's own."""
    try:
        token = _from_cli.set(options_from_namespace(args))
        try:
            return original(cls, args)
        finally:
            _from_cli.reset(token)
    except UserError as error:
        sys.exit(f"kvtuner: {error}")


def around_init(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Check and complete the arguments of ServerArgs before its own defaults are resolved."""
    options = _from_cli.get() or pop_options(kwargs)
    object.__setattr__(self, "_kvtuner", options)
    if options.enabled:
        kwargs = _quantized_arguments(type(self), kwargs, options)
    original(self, *args, **kwargs)
    if options.enabled:
        _check_model(self, options)


def _quantized_arguments(cls: type, kwargs: dict[str, Any], options: KvtunerOptions) -> dict[str, Any]:
    _check_sglang()
    for field in dataclasses.fields(cls):
        unusual = field.name in kwargs and kwargs[field.name] != _default(field)
        if field.name in GRAPH_ARGUMENTS and kwargs.get(field.name) == "disabled":
            continue
        if unusual and field.name not in ALLOWED_ARGUMENTS:
            raise ConfigError(f"--{field.name.replace('_', '-')} is not covered by a test with quantized keys and "
                              "values: leave it out, or give --enable-kvtuner-quant=False.")
    if kwargs.get("attention_backend") not in (None, BACKEND):
        raise ConfigError(f"--attention-backend {kwargs['attention_backend']} cannot read packed pages: leave it out, "
                          "so that kvtuner's own backend is used.")
    on_cpu = kwargs.get("device") == "cpu" or not torch.cuda.is_available()
    changes: dict[str, Any] = {"attention_backend": BACKEND, "page_size": options.page_tokens(kwargs.get("page_size"))}
    if any(fmt.key.per_channel for fmt in options.any_formats()) and kwargs.get("max_running_requests") is None:
        requests = CPU_MAX_RUNNING_REQUESTS if on_cpu else CUDA_MAX_RUNNING_REQUESTS
        logger.warning("kvtuner: --max-running-requests is not set; each running request keeps a page in full "
                       "precision, so it is limited to %d.", requests)
        changes["max_running_requests"] = requests
    if choose_attention(options.kvtuner_attention, on_cpu) == "fused":
        if kwargs.get("enable_mixed_chunk"):
            raise ConfigError("--enable-mixed-chunk makes every decode step dequantize whole requests in the kernels' "
                              "attention, which no test covers: leave it out, or give --kvtuner-attention reference.")
        changes["cuda_graph_backend_prefill"] = "disabled"
    elif not on_cpu:
        logger.warning("kvtuner: the reference attention cannot be captured, so CUDA graphs are off.")
        changes |= dict.fromkeys(GRAPH_ARGUMENTS, "disabled")
    return {**kwargs, **changes}


def _default(field: Any) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _check_sglang() -> None:
    import sglang

    if sglang.__version__ not in SUPPORTED_SGLANG:
        raise ConfigError(f"SGLang {sglang.__version__} is not covered by a test: install "
                          f"sglang=={SUPPORTED_SGLANG[-1]}.")
    if _broken_targets:
        raise ConfigError(f"this SGLang has no {_broken_targets[0]}, which kvtuner must hook: reinstall "
                          f"sglang=={SUPPORTED_SGLANG[-1]}.")


def _check_model(server_args: Any, options: KvtunerOptions) -> None:
    config = server_args.get_model_config()
    architectures = config.hf_config.architectures or ["none"]
    if architectures[0] not in SUPPORTED_ARCHITECTURES:
        raise ConfigError(f"architecture {architectures[0]} is not covered by a test with quantized keys and values: "
                          f"use one of {', '.join(SUPPORTED_ARCHITECTURES)}, or --enable-kvtuner-quant=False.")
    refuse_other_devices(server_args.device)
    layers = config.num_hidden_layers
    model = ModelIdentity(architectures[0], layers, config.get_total_num_kv_heads(), config.head_dim)
    plan = options.plan(layers, model)
    for fmt in plan:
        fmt.check(config.head_dim)
    if choose_attention(options.kvtuner_attention, server_args.device == "cpu") == "fused":
        refuse_old_gpus(torch.cuda.get_device_capability(server_args.base_gpu_id))
        refuse_without_kernels(plan, config.head_dim)
    if any(fmt.key.boosted for fmt in plan) and server_args.tp_size > model.kv_heads:
        raise ConfigError(f"--tp-size {server_args.tp_size} gives several ranks a copy of each of the model's "
                          f"{model.kv_heads} kv heads, and each would boost other channels of its keys: give "
                          f"--kvtuner-key-boost False or at most --tp-size {model.kv_heads}.")
    heads = config.num_attention_heads
    if server_args.device != "cpu" and heads % server_args.tp_size:
        raise ConfigError(f"--tp-size {server_args.tp_size} does not divide the model's {heads} query heads: "
                          "choose a divisor.")
