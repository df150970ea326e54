"""Which attention serves packed pages: the kernels of kvtuner_triton on a GPU, plain torch on a CPU or when asked."""

from collections.abc import Sequence
from typing import Literal

import torch

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.quant import KVFormat

Attention = Literal["auto", "fused", "reference"]
HEAD_DIMS = (64, 128)
OLDEST = (8, 0)  # compute capability: min.bf16x2, cvt.rz.f16x2 (kvtuner_triton/pairs.py)
GIVE_REFERENCE = "give --kvtuner-attention reference, which is slow"


def choose_attention(asked: Attention, on_cpu: bool) -> Literal["fused", "reference"]:
    """What `--kvtuner-attention` means on this device; raises ConfigError for kernels on a CPU."""
    if asked == "fused" and on_cpu:
        raise ConfigError("--kvtuner-attention fused needs an NVIDIA GPU: leave it out.")
    return "reference" if on_cpu or asked == "reference" else "fused"


def refuse_other_devices(device: str) -> None:
    """Raise ConfigError unless this is a CPU or an NVIDIA GPU: ROCm, too, calls its devices cuda."""
    if device != "cpu" and (device != "cuda" or torch.version.cuda is None):
        raise ConfigError(f"quantized keys and values need an NVIDIA GPU or a CPU, and device {device} of this torch "
                          "is neither: give --device cpu, or --enable-kvtuner-quant=False.")


def refuse_old_gpus(capability: tuple[int, int]) -> None:
    """Raise ConfigError for a GPU of a compute capability that lacks instructions of the kernels."""
    if capability < OLDEST:
        raise ConfigError(f"the kernels need a GPU from sm_{OLDEST[0]}{OLDEST[1]} on, and this one is "
                          f"sm_{capability[0]}{capability[1]}: {GIVE_REFERENCE}.")


def refuse_without_kernels(plan: Sequence[KVFormat], head_dim: int) -> None:
    """Raise ConfigError if the kernels cannot read heads of this size in the format of every layer."""
    if head_dim not in HEAD_DIMS:
        raise ConfigError(f"the kernels read heads of {' or '.join(map(str, HEAD_DIMS))} channels, not {head_dim}: "
                          f"{GIVE_REFERENCE}.")
    for number, fmt in enumerate(plan):
        where = f" (layer {number})" if len(set(plan)) > 1 else ""
        if not (fmt.key.quantized and fmt.value.quantized):
            raise ConfigError("the kernels read keys and values of 8, 4 or 2 bits, not 16 for one of them"
                              f"{where}: {GIVE_REFERENCE}.")
        if fmt.key.per_channel and (fmt.value.group_size or head_dim) != head_dim:
            raise ConfigError(f"beside keys per channel the kernels read values with one scale a token{where}: leave "
                              f"--kvtuner-q-group-size out, or {GIVE_REFERENCE}.")
