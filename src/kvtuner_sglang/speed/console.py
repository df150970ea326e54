"""What a speed run prints at its end."""

from kvtuner_sglang.evidence.assemble import Figures
from kvtuner_sglang.evidence.record import Metric

DECODE = ("decode_tok_s", "saturation_decode_tok_s")


def table(found: Figures) -> list[str]:
    """Lines for the console: tokens, every decode cell, every time to first token."""
    metrics = found.metrics
    tokens = metrics["kv_tokens"].p50
    lines = [f"  KV cache    {tokens:.0f} tokens"]
    if "kv_tokens_formula" in metrics:
        formula = metrics["kv_tokens_formula"].p50
        lines[0] += f", {tokens / formula:.3f} of the {formula:.0f} that its budget holds by the formula"
    for key, metric in metrics.items():
        name, _, where = key.partition("/")
        if name in DECODE:
            tpot = metrics[f"{name.replace('decode_tok_s', 'tpot_ms')}/{where}"]
            lines.append(f"  {name.removesuffix('_decode_tok_s').removesuffix('_tok_s'):<11} {at(where):<36} "
                         f"{metric.p50:10.1f} tok/s  {tpot.p50:8.2f} ms a step  {spread(metric)}")
        elif name in ("ttft_ms", "ttft_cached_ms"):
            lines.append(f"  TTFT        {at(where):<36} {metric.p50:10.1f} ms  {spread(metric)}")
    return lines + [f"  warning     {warning}" for warning in found.warnings]


def at(where: str) -> str:
    """ "batch=48/context=16384" -> "batch 48, context 16384"."""
    return where.replace("=", " ").replace("_", " ").replace("/", ", ")


def spread(metric: Metric) -> str:
    return f"min {metric.min:.1f} max {metric.max:.1f} n={metric.n}"
