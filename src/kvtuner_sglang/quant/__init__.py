"""What a low-bit KV format is: bits, groups, bytes per token, per-layer plans. Knows neither SGLang nor CUDA."""

from kvtuner_sglang.quant.format import KVFormat, KVShape, TensorFormat, format_hash, kv_format, uniform_plan

__all__ = ["KVFormat", "KVShape", "TensorFormat", "format_hash", "kv_format", "uniform_plan"]
