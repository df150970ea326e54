"""The three result sections: a table each, and an analysis whose every figure is computed from the record."""

from kvtuner_sglang.evidence.record import DeviceMemory, KVRecord, RunRecord
from kvtuner_sglang.evidence.sweep import markdown_table
from kvtuner_sglang.report.language import Text

MIB = 2**20
LEVEL_BAND = 0.1  # a change of the median below ten percent is called level
ALL_SUCCEEDED = "100%"  # of a run that is valid, as the method says: with a failed request it has no figures
MODEL_BITS = 16  # what effective_bits calls the model's own precision


def ttft_section(record: RunRecord, text: Text) -> list[str]:
    """Table and analysis of the time to first token."""
    lengths = record.levels("ttft_ms", "prompt_tokens")
    metrics = [record.metric("ttft_ms", prompt_tokens=n) for n in lengths]
    header = (text["prompt_length"], text["average_ms"], text["min_ms"], text["max_ms"], "p50", "p90", "n")
    rows = [(text["n_tokens"].format(n=n), *(f"{v:.2f}" for v in (m.mean, m.min, m.max, m.p50, m.p90)), str(m.n))
            for n, m in zip(lengths, metrics, strict=True)]
    return [f"### 1. {text['ttft']}", markdown_table(header, rows), text["ttft_method"],
            text["analysis"].format(sentences=_ttft_analysis(record, lengths, text))]


def _ttft_analysis(record: RunRecord, lengths: list[int], text: Text) -> str:
    metrics = {n: record.metric("ttft_ms", prompt_tokens=n) for n in lengths}
    short, long = lengths[0], lengths[-1]
    first, last = metrics[short].p50, metrics[long].p50
    if short == long:
        return text["ttft_analysis_one"].format(short=short, first=first, short_n=metrics[short].n)
    factor = last / first
    verb = "level" if abs(factor - 1) <= LEVEL_BAND else "grows" if factor > 1 else "falls"
    widest = max(lengths, key=lambda n: metrics[n].max / metrics[n].min)
    return text["ttft_analysis"].format(
        verb=text[verb], first=first, last=last, short=short, long=long, short_n=metrics[short].n,
        long_n=metrics[long].n, factor=factor, length_factor=long / short, spread_at=widest,
        spread_min=metrics[widest].min, spread_max=metrics[widest].max,
    )


def throughput_section(record: RunRecord, text: Text) -> list[str]:
    """Table and analysis of throughput and latency under load."""
    levels = record.levels("latency_ms", "concurrency")
    load = record.config["workload"]["throughput"]
    header = tuple(text[key] for key in ("concurrency", "request_rate", "token_rate", "latency_mean", "latency_p50",
                                         "latency_p90", "tpot_p50", "success", "requests"))
    method = text["throughput_method"].format(prompt=load["prompt_tokens"], output=load["output_tokens"])
    return [f"### 2. {text['throughput']}", markdown_table(header, [_level_row(record, level) for level in levels]),
            method, text["analysis"].format(sentences=_throughput_analysis(record, levels, text))]


def _level_row(record: RunRecord, level: int) -> tuple[str, ...]:
    latency = record.metric("latency_ms", concurrency=level)
    tpot = record.metrics.get(f"tpot_ms/concurrency={level}")  # absent when one output token is asked for
    return (
        str(level), f"{record.metric('requests_per_s', concurrency=level).mean:.2f}",
        f"{record.metric('output_tokens_per_s', concurrency=level).mean:.1f}", f"{latency.mean:.1f}",
        f"{latency.p50:.1f}", f"{latency.p90:.1f}", f"{tpot.p50:.1f}" if tpot else "",
        ALL_SUCCEEDED, str(latency.n),
    )


def _throughput_analysis(record: RunRecord, levels: list[int], text: Text) -> str:
    rates = {n: record.metric("output_tokens_per_s", concurrency=n).mean for n in levels}
    latency = {n: record.metric("latency_ms", concurrency=n) for n in levels}
    best = max(rates, key=rates.__getitem__)
    return text["throughput_analysis"].format(
        tokens=rates[best], rate=record.metric("requests_per_s", concurrency=best).mean, best=best,
        first=latency[levels[0]].mean, last=latency[levels[-1]].mean, low=levels[0], high=levels[-1],
        sent=sum(latency[n].n for n in levels),
    )


def memory_section(record: RunRecord, kv: KVRecord, text: Text, number: int) -> list[str]:
    """Device memory as the seed report has it, and beside it what the pool holds; the results' section `number`."""
    header = tuple(text[key] for key in ("device", "node_column", "used_mib", "total_mib", "utilization", "source"))
    return [
        f"### {number}. {text['memory']}",
        markdown_table(header, [_device_row(device, text) for device in record.memory]),
        text["prealloc"],
        _pool_table(kv, text),
        text["analysis"].format(sentences=_memory_analysis(kv, text)),
    ]


def _device_row(device: DeviceMemory, text: Text) -> tuple[str, ...]:
    used, total = device.used_mib, device.total_mib
    share = f"{used / total:.1%}" if used is not None and total is not None else ""
    return (text.said(device.name), "" if device.node_rank is None else str(device.node_rank),
            f"{used:.0f}" if used is not None else text.said(device.unknown["used_mib"]),
            f"{total:.0f}" if total is not None else "", share, text.said(device.source))


def _pool_table(kv: KVRecord, text: Text) -> str:
    header = (text["rank"], text["layers"], text["kv_heads"], text["kv_tokens"], text["bytes_formula"],
              text["bytes_allocated"], text["bytes_full"].format(dtype=kv.full_precision_dtype), text["pool_mib"],
              text["tail_mib"], text["room"], text["pool_class"])
    rows = [(str(r.rank), f"{r.layers[0]}-{r.layers[1] - 1}", str(r.kv_heads), str(r.tokens),
             f"{r.bytes_per_token_formula:.1f}", f"{r.bytes_per_token_allocated:.1f}", f"{r.bytes_per_token_full:.0f}",
             f"{r.pool_bytes / MIB:.1f}", f"{r.tail_bytes / MIB:.1f}",
             "" if room is None else str(room), r.pool_class) for r, room in zip(kv.ranks, _room(kv), strict=True)]
    return markdown_table(header, rows)


def _room(kv: KVRecord) -> list[int | None]:
    """Tokens that each rank's budget, its tails taken off, has room for by the formula; the least is what all offer."""
    if kv.budget_bytes_per_rank is None:
        return [None] * len(kv.ranks)
    return [int((kv.budget_bytes_per_rank - r.tail_bytes) // r.bytes_per_token_formula) for r in kv.ranks]


def _least_room(kv: KVRecord, text: Text) -> list[str]:
    """Which rank limits the others, where stages differ in bytes a token; nothing where they do not."""
    rooms = [(room, r) for room, r in zip(_room(kv), kv.ranks, strict=True) if room is not None]
    if len({r.bytes_per_token_formula for _, r in rooms}) < 2:
        return []
    (least, rank), (most, _) = (pick(rooms, key=lambda pair: pair[0]) for pick in (min, max))
    return [text["least_room"].format(rank=rank.rank, first=rank.layers[0], last=rank.layers[1] - 1,
                                      bytes=rank.bytes_per_token_formula, least=least, most=most)]


def _memory_analysis(kv: KVRecord, text: Text) -> str:
    if kv.budget_bytes_per_rank is None or kv.full_precision_tokens is None or kv.capacity_ratio is None:
        return text["memory_analysis_free"].format(tokens=kv.tokens, bits=kv.effective_bits)
    sentences = [text["memory_analysis"].format(tokens=kv.tokens, bits=kv.effective_bits,
                                                 budget=kv.budget_bytes_per_rank / MIB), *_least_room(kv, text)]
    if kv.effective_bits < MODEL_BITS:
        sentences.append(text["memory_ratio"].format(dtype=kv.full_precision_dtype, full=kv.full_precision_tokens,
                                                     ratio=kv.capacity_ratio))
        if kv.full_precision_dtype == "float32":
            sentences.append(text["memory_ratio_16"].format(ratio=kv.capacity_ratio / 2))
    return text["sentence_gap"].join(sentences)
