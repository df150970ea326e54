"""What the command line says at the end of a run."""

from kvtuner_sglang.evidence.record import RunRecord
from kvtuner_sglang.report.load import is_load, levels


def print_summary(record: RunRecord) -> str:
    """A few lines for the terminal; the caller prints them. A run that is not ok says why and gives no figure."""
    head = f"{record.name}: {record.status}"
    if record.kv is None:
        return f"{head}\n  {record.reason}"
    kv = record.kv
    capacity = f"{kv.tokens} tokens at {kv.effective_bits:.2f} effective bits"
    if kv.capacity_ratio:
        capacity += f", {kv.capacity_ratio:.2f} times {kv.full_precision_dtype}"
    lines = [head, f"  KV cache    {capacity}"]
    for length in record.levels("ttft_ms", "prompt_tokens"):
        ttft = record.metric("ttft_ms", prompt_tokens=length)
        lines.append(f"  TTFT        {length:>5} tokens  p50 {ttft.p50:8.1f} ms  p90 {ttft.p90:8.1f} ms  n={ttft.n}")
    for level in record.levels("latency_ms", "concurrency"):
        latency = record.metric("latency_ms", concurrency=level)
        rate = record.metric("output_tokens_per_s", concurrency=level).mean
        lines.append(f"  throughput  {level:>5} at once {rate:8.1f} tok/s  latency {latency.mean:8.1f} ms  "
                     f"n={latency.n}")
    lines += _load_lines(record) if is_load(record) else []
    lines += [f"  warning     {warning}" for warning in record.warnings]
    if record.tracking.status == "failed":
        lines.append(f"  warning     not mirrored to W&B: {record.tracking.reason}")
    return "\n".join(lines)


def _load_lines(record: RunRecord) -> list[str]:
    lines = []
    for where in levels(record):
        ttft, tpot = record.metrics[f"ttft_ms/{where}"], record.metrics[f"tpot_ms/{where}"]
        rate = record.metrics.get(f"output_tokens_per_s/{where}")  # of a conversation's single turn there is none
        lines.append(f"  load        {where:24} TTFT p50 {ttft.p50:8.1f} ms  TPOT p50 {tpot.p50:8.1f} ms  n={ttft.n}"
                     + (f"  {rate.mean:8.1f} tok/s" if rate else ""))
    if capacity := record.metrics.get("capacity_per_s"):
        lines.append(f"  capacity    {capacity.mean:.3g} req/s within the SLO, mean of {capacity.n} repeats")
    return lines
