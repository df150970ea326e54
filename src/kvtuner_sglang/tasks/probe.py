"""task=probe, and the first thing that task=serve does: may this model be served in this format at all?"""

from collections.abc import Callable

from kvtuner_sglang.config import RunConfig
from kvtuner_sglang.evidence.outcome import Outcome
from kvtuner_sglang.serving.cache_folder import cache_folder
from kvtuner_sglang.serving.checkpoint import Checkpoint, prepare_checkpoint
from kvtuner_sglang.serving.device import serving_device

Say = Callable[[str], None]


def run(config: RunConfig, say: Say) -> Outcome:
    """Probe the configured model and format; raises UserError above the bound."""
    if config.quant.enabled:
        checkpoint = prepare_checkpoint(config.model.source, config.model.path, say)
        config.quant.require_fits(checkpoint.identity)
        require_probed(config, checkpoint, say)
    else:
        say(f"probe: quant={config.quant.name} stores keys and values as they are, so there is nothing to compare")
    return Outcome(None, "ok", skipped=False, reason=None)


def require_probed(config: RunConfig, checkpoint: Checkpoint, say: Say) -> None:
    """Raises UserError, one sentence, if the format costs this model more than quality.probe_bound."""
    if not config.quant.enabled:
        return
    import torch  # here: without quantization there is nothing to wait for

    from kvtuner_sglang.quality.probe import ensure_probed

    device = serving_device(config.server)
    dtype = config.model.dtype_cpu if device == "cpu" else config.model.dtype_cuda
    ensure_probed(
        model_name=config.model.name, model_path=checkpoint.path, model_sha256=checkpoint.sha256,
        plan_name=config.quant.name, plan=config.quant.plan(checkpoint.layers),
        page_size=config.quant.page_tokens, tokens=config.quality.probe_tokens, bound=config.quality.probe_bound,
        device=device, dtype=getattr(torch, dtype), cache_dir=cache_folder("probe"), say=say,
    )
