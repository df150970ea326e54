"""float32 on a GPU: SGLang's fused norm, activation and rotary kernels take 16-bit numbers only.

A measurement in float32 has a noise floor far below what four bits cost; in bfloat16 it does not.  So the scheduler
process of such a measurement uses SGLang's own plain-torch versions of these layers.
"""

from typing import Any


def run_scheduler(*args: Any, **kwargs: Any) -> Any:
    """SGLang's scheduler process, its layers in plain torch: for Engine.run_scheduler_process_func."""
    from sglang.srt.layers.utils.multi_platform import MultiPlatformOp
    from sglang.srt.managers.scheduler import run_scheduler_process

    def plain(layer: Any) -> Any:
        return layer.forward_native

    MultiPlatformOp.dispatch_forward = plain
    return run_scheduler_process(*args, **kwargs)
