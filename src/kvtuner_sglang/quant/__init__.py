"""What a low-bit KV format is: bits, groups, bytes per token, per-layer plans. Knows neither SGLang nor CUDA."""

from kvtuner_sglang.quant.format import (
    KVFormat,
    KVShape,
    TensorFormat,
    describe_plan,
    format_hash,
    kv_format,
    mean_bits,
    page_tokens,
    uniform_plan,
)
from kvtuner_sglang.quant.plan_file import LayerFormat, ModelIdentity, PlanFile, Provenance, load_plan, write_plan

__all__ = [
    "KVFormat", "KVShape", "LayerFormat", "ModelIdentity", "PlanFile", "Provenance", "TensorFormat", "describe_plan",
    "format_hash", "kv_format", "load_plan", "mean_bits", "page_tokens", "uniform_plan", "write_plan",
]
