"""float32 on a GPU: SGLang's fused norm, activation and rotary kernels take 16-bit numbers only.

A measurement in float32 has a noise floor far below what four bits cost; in bfloat16 it does not.  So a rank in float32
on a GPU, which could not serve at all, uses SGLang's own plain-torch versions of these layers.
"""

from typing import Any

import torch


def needed(server_args: Any) -> bool:
    """Whether the fused layers cannot serve these arguments."""
    return server_args.dtype in ("float", "float32") and server_args.device == "cuda" and torch.cuda.is_available()


def use_plain_layers() -> None:
    """Every layer made from now on in this process takes its plain-torch path."""
    from sglang.srt.layers.utils.multi_platform import MultiPlatformOp

    MultiPlatformOp.dispatch_forward = _plain


def _plain(layer: Any) -> Any:
    return layer.forward_native
