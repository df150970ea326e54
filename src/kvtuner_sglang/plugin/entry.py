"""The entry point `sglang.srt.plugins`: registers every hook, in the launcher and in each scheduler process."""

import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from kvtuner_sglang.plugin import arguments, heartbeat, logits_file, plain_layers
from kvtuner_sglang.plugin.attention_choice import choose_attention
from kvtuner_sglang.plugin.options import add_cli_flags, options_of
from kvtuner_sglang.plugin.refusal import refusing_in_one_sentence

CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
POOL_SIZES = "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator"
PAGE_ALLOCATOR = "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator"
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"


def _later(module: str, name: str) -> Callable[..., Any]:
    """A hook whose module is imported when it first runs: importing SGLang's pools in the launcher is slow."""

    def hook(*args: Any, **kwargs: Any) -> Any:
        return getattr(pkgutil.resolve_name(f"kvtuner_sglang.plugin.{module}"), name)(*args, **kwargs)

    return hook


def _after_add_cli_args(_result: None, parser: Any) -> None:
    add_cli_flags(parser)


def _after_support_triton(result: bool, backend: str) -> bool:
    """SGLang's helper kernels run where there is a GPU; our backend's name alone does not tell."""
    import torch

    return result and (backend != arguments.BACKEND or torch.cuda.is_available())


def _around_scheduler_init(original: Callable[..., None], scheduler: Any, server_args: Any, *args: Any,
                           **kwargs: Any) -> None:
    """Runs first in every rank: makes float32 possible on a GPU, switches measurement-only output on, and turns a
    refusal into its one sentence."""
    with refusing_in_one_sentence():
        options = options_of(server_args)
        if plain_layers.needed(server_args):
            plain_layers.use_plain_layers()
        if options.kvtuner_logits_dir is not None:
            logits_file.write_to(Path(options.kvtuner_logits_dir))
        if options.kvtuner_heartbeat_dir is not None:
            Path(options.kvtuner_heartbeat_dir).mkdir(parents=True, exist_ok=True)
        original(scheduler, server_args, *args, **kwargs)


HOOKS: tuple[tuple[str, Callable[..., Any], HookType], ...] = (
    ("sglang.srt.server_args.ServerArgs.add_cli_args", _after_add_cli_args, HookType.AFTER),
    ("sglang.srt.server_args.ServerArgs.from_cli_args", arguments.around_from_cli_args, HookType.AROUND),
    ("sglang.srt.server_args.ServerArgs.__init__", arguments.around_init, HookType.AROUND),
    ("sglang.srt.utils.common.support_triton", _after_support_triton, HookType.AFTER),
    (f"{CONFIGURATOR}._profile_available_bytes", _later("sizing", "around_profile_available_bytes"), HookType.AROUND),
    (f"{CONFIGURATOR}._build_mha_kv_pool", _later("sizing", "around_build_mha_kv_pool"), HookType.AROUND),
    (f"{POOL_SIZES}._compute_cell_size", _later("sizing", "around_compute_cell_size"), HookType.AROUND),
    (f"{POOL_SIZES}.calculate_pool_sizes", _later("sizing", "around_calculate_pool_sizes"), HookType.AROUND),
    (f"{PAGE_ALLOCATOR}.alloc_extend", _later("cpu_allocator", "around_alloc_extend"), HookType.AROUND),
    (f"{PAGE_ALLOCATOR}.alloc_decode", _later("cpu_allocator", "around_alloc_decode"), HookType.AROUND),
    ("sglang.srt.mem_cache.allocation.get_last_loc", _later("cpu_allocator", "around_get_last_loc"), HookType.AROUND),
    (f"{SCHEDULER}.__init__", _around_scheduler_init, HookType.AROUND),
    (f"{SCHEDULER}.get_init_info", _later("startup_check", "after_get_init_info"), HookType.AFTER),
    ("sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver.recv_requests",
     heartbeat.before_recv_requests, HookType.BEFORE),
    ("sglang.srt.layers.logits_processor.LogitsProcessor._get_logits", logits_file.around_get_logits, HookType.AROUND),
)


def register() -> None:
    """Register all hooks and the attention backend; SGLang applies them right after this returns."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.server_args import add_attention_backend_choices

    for target, hook, kind in HOOKS:
        try:
            pkgutil.resolve_name(target)
        except (ImportError, AttributeError):
            arguments.note_broken_target(target)
        else:
            HookRegistry.register(target, hook, kind)
    add_attention_backend_choices([arguments.BACKEND])
    register_attention_backend(arguments.BACKEND)(_create_backend)


def _create_backend(model_runner: Any) -> Any:
    options = options_of(model_runner.server_args)
    if choose_attention(options.kvtuner_attention, model_runner.device == "cpu") == "fused":
        from kvtuner_sglang.plugin.fused_backend import FusedBackend

        return FusedBackend(model_runner)
    from kvtuner_sglang.plugin.reference_backend import ReferenceBackend

    return ReferenceBackend(model_runner)
