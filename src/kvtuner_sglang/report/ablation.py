"""The ablation so far: runs that differ from this one in their quantization alone, and the commands for the others."""

import shlex
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.record import RECORD_FILE, RunRecord, load_record
from kvtuner_sglang.evidence.sweep import markdown_table
from kvtuner_sglang.report.language import Text

SEED_ABLATION = ("bf16", "kv8", "kv4", "kv2")
ELSEWHERE = "\N{DAGGER}"
NOT_COMPARED = ("quant", "plan", "force", "runs_dir", "tracking", "report")


def siblings(record: RunRecord, runs_dir: Path) -> list[RunRecord]:
    """Those of the records in runs_dir; a file that is no record of this schema is left out."""
    records = []
    for path in sorted(runs_dir.glob(f"*/{RECORD_FILE}")):
        with suppress(UserError):  # of another version or task: nothing to compare
            records.append(load_record(path.parent))
    return siblings_among(record, records)


def siblings_among(record: RunRecord, records: Iterable[RunRecord]) -> list[RunRecord]:
    """Those that differ from `record` in quant alone and ran on a machine of its name and kind, this one excepted.

    Of several with the same quant name the last one to end.
    """
    found: dict[str, RunRecord] = {}
    for other in records:
        name = quant_name(other)
        if other.name == record.name or name == quant_name(record) or not _comparable(record, other):
            continue
        if name not in found or other.ended > found[name].ended:
            found[name] = other
    return list(found.values())


def quant_name(record: RunRecord) -> str:
    return record.config["quant"]["name"]


def _comparable(one: RunRecord, other: RunRecord) -> bool:
    def kept(record: RunRecord) -> dict[str, Any]:
        return {key: value for key, value in record.config.items() if key not in NOT_COMPARED}

    return kept(one) == kept(other) and one.environment.machine == other.environment.machine


def ablation_section(record: RunRecord, others: Sequence[RunRecord], text: Text) -> list[str]:
    """The table over the seed's four formats and whatever else was run, and a warning if commits are mixed."""
    runs = {quant_name(run): run for run in (record, *others)}
    names = [*SEED_ABLATION, *sorted(runs.keys() - set(SEED_ABLATION))]
    length, level = record.levels("ttft_ms", "prompt_tokens")[-1], record.levels("latency_ms", "concurrency")[-1]
    dtype = record.kv.full_precision_dtype if record.kv else ""
    header = (text["setting"], text["parameters"], text["status"], text["kv_tokens"],
              text["capacity"].format(dtype=dtype), text["effective_bits"], text["ttft_at"].format(n=length),
              text["rate_at"].format(n=level), text["commit"])
    rows = [_row(name, runs.get(name), record, length, level, text) for name in names]
    apart = [text["elsewhere"].format(mark=ELSEWHERE)] if any(_elsewhere(run, record) for run in runs.values()) else []
    return [f"## {text['ablation']}", text["ablation_method"], markdown_table(header, rows), *apart,
            *mixed_commits(list(runs.values()), text)]


def _elsewhere(run: RunRecord, this: RunRecord) -> str:
    """The mark of times from another machine of the kind."""
    return ELSEWHERE if run.measured_apart(this) else ""


def mixed_commits(runs: Sequence[RunRecord], text: Text) -> list[str]:
    """A warning if the runs are not all of one clean commit."""
    commits = sorted({commit(run, text) for run in runs})
    if len(commits) == 1 and not any(run.environment.git_dirty for run in runs):
        return []
    return [text["mixed_commits"].format(commits=", ".join(commits))]


def ended(run: RunRecord, text: Text) -> str:
    """How a run without figures ended, and why."""
    return text["ended"].format(status=text.status(run.status), reason=text.said(run.reason or ""))


def _row(name: str, run: RunRecord | None, this: RunRecord, length: int, level: int, text: Text) -> tuple[str, ...]:
    if run is None:
        command = text["missing"].format(command=command_line(this, f"quant={name}"))
        return (name, "", command, "", "", "", "", "", "")
    label = text["this_run"].format(quant=name) if run.name == this.name else name
    if run.kv is None:
        return (label, _flags(run), ended(run, text), "", "", "", "", "", commit(run, text))
    ratio = f"{run.kv.capacity_ratio:.2f}" if run.kv.capacity_ratio else ""
    mark = _elsewhere(run, this)
    return (label, _flags(run), text.status(run.status), str(run.kv.tokens), ratio, f"{run.kv.effective_bits:.2f}",
            f"{run.metric('ttft_ms', prompt_tokens=length).p50:.1f}{mark}",
            f"{run.metric('output_tokens_per_s', concurrency=level).mean:.1f}{mark}", commit(run, text))


def commit(run: RunRecord, text: Text) -> str:
    """Short, with a + where there were uncommitted changes."""
    sha = run.environment.git_sha
    return f"{sha[:10]}{'+' if run.environment.git_dirty else ''}" if sha else text["commit_unknown"]


def _flags(run: RunRecord) -> str:
    """The quantization flags of node 0's command, as the seed report lists them."""
    if not run.commands:
        return ""
    argv = run.commands[0].argv
    flags = ("--enable-kvtuner", "--kvtuner-", "--kv-cache-dtype")
    kept = [" ".join(pair) for pair in _pairs(argv)
            if pair[0].startswith(flags) and not pair[0].startswith("--kvtuner-heartbeat")]
    return f"`{' '.join(kept)}`" if kept else ""


def _pairs(argv: Iterable[str]) -> list[list[str]]:
    pairs: list[list[str]] = [[]]
    for word in argv:
        if word.startswith("--"):
            pairs.append([])
        pairs[-1].append(word)
    return [pair for pair in pairs if pair]


def command_line(record: RunRecord, *replaced: str) -> str:
    """The run.py command of `record`, with the overrides of the same names replaced."""
    names = {word.split("=", 1)[0] for word in replaced}
    kept = [word for word in record.overrides
            if (name := word.split("=", 1)[0]) not in names and name.split(".", 1)[0] not in names]
    return shlex.join(["python", "run.py", *kept, *replaced])
