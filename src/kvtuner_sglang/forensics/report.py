"""The findings in words and tables, from a record and the seed's claims; a run that is not ok has none."""

from collections.abc import Sequence
from pathlib import Path

from kvtuner_sglang.evidence.record import KVRecord, Metric, RunRecord, load_record
from kvtuner_sglang.evidence.sweep import markdown_table
from kvtuner_sglang.evidence.tidy_tables import to_csv
from kvtuner_sglang.forensics.claimed import Claimed, claimed
from kvtuner_sglang.forensics.figure import write_figure
from kvtuner_sglang.forensics.table import TABLE_FILE, table_of
from kvtuner_sglang.forensics.text_en import TEXT as ENGLISH
from kvtuner_sglang.measure.hardware import PEAKS
from kvtuner_sglang.report.console import print_summary
from kvtuner_sglang.report.markdown import write_report

TEXTS = {"en": ENGLISH}
MIB = 2**20
Text = dict[str, str]


def write_findings(run_dir: Path) -> Path:
    """The report of run_dir with the findings first and, of a run that is ok, table and figure; returns the report."""
    record = load_record(run_dir)
    if record.status != "ok":
        return write_report(run_dir)
    table = run_dir / TABLE_FILE
    table.write_text(to_csv(table_of([record])))
    write_figure(run_dir)
    return write_report(run_dir, first=[*sections(record, claimed()), f"![]({table.with_suffix('.png').name})"])


def sections(record: RunRecord, seed: Claimed) -> list[str]:
    """Title, paragraph, both tables and what they stand on."""
    text = TEXTS[record.config["report"]["language"]]
    kv = _kv(record)
    return [
        f"## {text['title']}", paragraph(record, seed), _memory(record, kv, text),
        f"### {text['ttft']}", _ttft_table(record, seed, text),
        f"### {text['throughput']}", _throughput_table(record, seed, text),
        text["notes"].format(source=seed.source, sheet=PEAKS[seed.gpu].source, here=text["here_measured"]),
    ]


def paragraph(record: RunRecord, seed: Claimed) -> str:
    """What happened, for the paper; every figure is the record's, the claim's or computed from both."""
    text = TEXTS[record.config["report"]["language"]]
    lengths = [n for n in record.levels("node1_reply_ms", "prompt_tokens") if seed.ttft_at(n)]
    claims = {n: row for n in lengths if (row := seed.ttft_at(n))}
    replies = _all(record, "node1_reply_ms", "prompt_tokens") + _all(record, "node1_loaded_reply_ms", "concurrency")
    means = {n: record.metric("node1_reply_ms", prompt_tokens=n).mean for n in lengths}
    valid = [record.metric("ttft_ms", prompt_tokens=n).mean for n in lengths]
    ratios = [means[n] / claims[n].mean_ms for n in lengths]
    longest, floor, dist = lengths[-1], seed.floor, record.config["dist"]
    longest_floor, read_ms = _known(floor.prefill_ms(0, longest)), _known(floor.decode_step_ms(1, 0))
    return text["paragraph"].format(
        claim_low=min(c.mean_ms for c in claims.values()), claim_high=max(c.mean_ms for c in claims.values()),
        claim_max=max(c.max_ms for c in claims.values()), shortest=lengths[0], longest=longest, seed_model=seed.model,
        gpu=seed.gpu, tp=dist["tp"], pp=dist["pp"], nnodes=dist["nnodes"], model=record.config["model"]["name"],
        quant=record.config["quant"]["name"], machine=record.environment.machine.partition(": ")[2],
        replies=sum(metric.n for metric in replies), reply_low=min(means.values()), reply_high=max(means.values()),
        ratio_low=min(ratios), ratio_high=max(ratios), valid_low=min(valid), valid_high=max(valid), read_ms=read_ms,
        longest_floor=longest_floor, longest_times=longest_floor / claims[longest].mean_ms,
        claim_rate=max(row.requests_per_s for row in seed.throughput),
        reply_rate=max(m.mean for m in _all(record, "node1_replies_per_s", "concurrency")),
        valid_rate=max(m.mean for m in _all(record, "requests_per_s", "concurrency")),
        claim_used=seed.memory[0].used_mib / seed.memory[0].total_mib,
    )


def console_lines(record: RunRecord) -> list[str]:
    """The summary of every run and, of one that is ok, how node 1's replies compare with the claims."""
    lines = [print_summary(record)]
    for tokens in record.levels("node1_reply_ms", "prompt_tokens"):
        reply, claim = record.metric("node1_reply_ms", prompt_tokens=tokens), claimed().ttft_at(tokens)
        ratio = f", {reply.mean / claim.mean_ms:.2f} times the claim of {claim.mean_ms:.2f} ms" if claim else ""
        lines.append(f"  HTTP 404    {tokens:>5} tokens  mean {reply.mean:6.2f} ms{ratio}  n={reply.n}")
    return lines


def _memory(record: RunRecord, kv: KVRecord, text: Text) -> str:
    if kv.budget_bytes_per_rank is None or kv.full_precision_tokens is None:
        return ""
    pool = max(rank.pool_bytes + rank.tail_bytes for rank in kv.ranks)
    return text["memory"].format(
        pool_mib=pool / MIB, budget_mib=kv.budget_bytes_per_rank / MIB, share=pool / kv.budget_bytes_per_rank,
        quant=record.config["quant"]["name"], tokens=kv.tokens, full=kv.full_precision_tokens,
        dtype=kv.full_precision_dtype)


def memory_table(records: Sequence[RunRecord]) -> str:
    """The pool of every run and what its bytes hold; in the language of the first."""
    text = TEXTS[records[0].config["report"]["language"]]
    header = tuple(text[key] for key in ("quant", "used", "pool", "budget", "kv_tokens"))
    rows = []
    for record in records:
        kv = _kv(record)
        used = [device.used_mib for device in record.memory if device.used_mib is not None]
        rows.append((
            record.config["quant"]["name"], f"{min(used):.0f} to {max(used):.0f}" if used else "",
            f"{max(rank.pool_bytes + rank.tail_bytes for rank in kv.ranks) / MIB:.1f}",
            f"{kv.budget_bytes_per_rank / MIB:.1f}" if kv.budget_bytes_per_rank else "", str(kv.tokens)))
    return f"### {text['memory_title']}\n\n" + markdown_table(header, rows)


def _ttft_table(record: RunRecord, seed: Claimed, text: Text) -> str:
    header = tuple(text[key] for key in ("prompt", "claimed", "not_found", "ratio", "valid", "floor", "seed_floor"))
    rows = []
    for n in record.levels("node1_reply_ms", "prompt_tokens"):
        claim, reply = seed.ttft_at(n), record.metric("node1_reply_ms", prompt_tokens=n)
        rows.append((
            text["tokens"].format(n=n),
            f"{claim.mean_ms:.2f}, {claim.min_ms:.2f} to {claim.max_ms:.2f}" if claim else "", _spread(reply),
            f"{reply.mean / claim.mean_ms:.2f}" if claim else "", _spread(record.metric("ttft_ms", prompt_tokens=n)),
            f"{record.metric('ttft_floor_ms', prompt_tokens=n).mean:.2f}",
            f"{_known(seed.floor.prefill_ms(0, n)):.2f}"))
    return markdown_table(header, rows)


def _throughput_table(record: RunRecord, seed: Claimed, text: Text) -> str:
    header = tuple(text[key] for key in (
        "concurrency", "claimed_rate", "reply_rate", "script_success", "http_200", "valid_rate", "claimed_latency",
        "reply_latency", "valid_latency"))
    rows = []
    for n in record.levels("node1_replies_per_s", "concurrency"):
        claim = seed.throughput_at(n)
        mean = {name: record.metric(name, concurrency=n).mean for name in (
            "node1_replies_per_s", "node1_script_success_ratio", "node1_http_200_ratio", "requests_per_s",
            "node1_loaded_reply_ms", "latency_ms")}
        rows.append((
            str(n), f"{claim.requests_per_s:.2f}" if claim else "", f"{mean['node1_replies_per_s']:.2f}",
            f"{mean['node1_script_success_ratio']:.0%}", f"{mean['node1_http_200_ratio']:.0%}",
            f"{mean['requests_per_s']:.2f}", f"{claim.latency_ms:.2f}" if claim else "",
            f"{mean['node1_loaded_reply_ms']:.2f}", f"{mean['latency_ms']:.0f}"))
    return markdown_table(header, rows)


def _spread(metric: Metric) -> str:
    return f"{metric.mean:.2f}, {metric.min:.2f} to {metric.max:.2f}"


def _all(record: RunRecord, name: str, label: str) -> list[Metric]:
    return [record.metric(name, **{label: level}) for level in record.levels(name, label)]


def _known(value: float | None) -> float:
    if value is None:
        raise ValueError("the seed's GPU is not in PEAKS")
    return value


def _kv(record: RunRecord) -> KVRecord:
    if record.kv is None:
        raise ValueError(f"{record.name} is {record.status} and has no findings")
    return record.kv
