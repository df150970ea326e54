"""report.md: every section of the seed's report, written from the record alone (and its siblings, for the ablation)."""

import shlex
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path

from kvtuner_sglang.evidence.record import (
    Environment,
    KVRecord,
    NodeCommandRecord,
    RunRecord,
    load_record,
    write_atomically,
)
from kvtuner_sglang.evidence.sweep import markdown_table
from kvtuner_sglang.report.ablation import ablation_section, command_line, siblings
from kvtuner_sglang.report.architecture import diagram, role
from kvtuner_sglang.report.language import TEXTS, Text
from kvtuner_sglang.report.load import formats_section, is_load, load_section
from kvtuner_sglang.report.tables import memory_section, throughput_section, ttft_section

REPORT_FILE = "report.md"


def write_report(run_dir: Path, first: Sequence[str] = (), language: str | None = None) -> Path:
    """Write run_dir/report.md from run_dir/record.json and the records beside run_dir; returns its path.

    first: a task's own sections, shown before the results.  language: another one than the run was asked for.
    """
    record = load_record(run_dir)
    path = run_dir / REPORT_FILE
    write_atomically(path, render(record, siblings(record, run_dir.parent), first, language))
    return path


def render(record: RunRecord, others: Sequence[RunRecord] = (), first: Sequence[str] = (),
           language: str | None = None) -> str:
    """The whole report as Markdown; a run that is not ok gets its reason and no figure."""
    text = TEXTS[language or record.config["report"]["language"]]
    parts = [f"# {text['title'].format(date=record.started[:10])}", *_configuration(record, text), *first]
    if record.kv is None:
        parts += [
            f"## {text['failed'].format(status=text.status(record.status))}",
            text["failed_why"].format(status=text.status(record.status), reason=text.said(record.reason or "")),
            text["failed_logs"].format(samples=record.samples.file, count=record.samples.count),
        ]
    else:
        tests = load_section(record, text) if is_load(record) else [*ttft_section(record, text),
                                                                    *throughput_section(record, text)]
        number = 1 + sum(part.startswith("### ") for part in tests)
        parts += [f"## {text['results']}", *tests,
                  *memory_section(record, record.kv, text, number), *_warnings(record, text),
                  f"## {text['architecture']}", _one_host(record.kv, record.commands, text),
                  f"```\n{diagram(record.commands, record.kv.ranks, text)}\n```"]
    parts += _commands(record, text)
    if record.kv is not None:
        compared = formats_section if is_load(record) else ablation_section
        parts += [*compared(record, others, text), *_validity(record, record.kv, text)]
    parts += _reproduce(record, text)
    parts += ["---", text["footer"].format(started=record.started, ended=record.ended)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _configuration(record: RunRecord, text: Text) -> list[str]:
    dist, environment = record.config["dist"], record.environment
    rows = [
        (text["status"], text.status(record.status)),
        (text["date"], record.started),
        (text["model"], _model(record, text)),
        (text["distribution"], f"TP={dist['tp']}, PP={dist['pp']}, NNODES={dist['nnodes']}"),
        (text["quantization"], _quantization(record, text)),
        *((text["node"].format(rank=c.node_rank), f"{c.host}:{c.http_port} ({role(c.node_rank, text)})")
          for c in record.commands),
        (text["machine"], _machine(environment, text)),
        (text["software"], ", ".join(f"{name} {version}" for name, version in environment.packages.items() if version)),
        (text["commit"], _commit(record, text)),
    ]
    return [f"## {text['configuration']}", markdown_table((text["item"], text["setting"]), rows)]


def _model(record: RunRecord, text: Text) -> str:
    if record.model is None:
        unknown = text["not_known"].format(reason=text.said(record.unknown["model"]))
        return f"{record.config['model']['name']}: {unknown}"
    model = record.model
    return text["model_facts"].format(name=model.name, architecture=model.architecture, dtype=model.dtype,
                                      parameters=model.parameters / 1e6, source=model.source, sha=model.sha256[:12])


def _machine(environment: Environment, text: Text) -> str:
    if environment.gpus:
        return text["machine_gpu"].format(host=environment.host, gpus=environment.hardware)
    return text["machine_cpu"].format(host=environment.host, cpu=environment.cpu, cores=environment.cpu_cores)


def _quantization(record: RunRecord, text: Text) -> str:
    quant = record.config["quant"]
    if quant.get("kv_cache_dtype", "auto") != "auto":
        return text["sglangs_own"].format(dtype=quant["kv_cache_dtype"])
    if not quant["enabled"]:
        if record.kv is None:
            return text["no_quantization_unknown"]
        return text["no_quantization"].format(dtype=record.kv.full_precision_dtype)
    bits = quant["name"]
    if quant.get("plan_file") is None:
        bits += f" (Key={quant['nbits_key']}bit, Value={quant['nbits_value']}bit)"
    return bits if record.kv is None else text["bits_and_format"].format(bits=bits, format=text.said(record.kv.format))


def _commit(record: RunRecord, text: Text) -> str:
    environment = record.environment
    if environment.git_sha is None:
        return text["not_known"].format(reason=text.said(environment.unknown["git_sha"]))
    return text["commit_dirty"].format(sha=environment.git_sha) if environment.git_dirty else environment.git_sha


def _one_host(kv: KVRecord, commands: Sequence[NodeCommandRecord], text: Text) -> str:
    """What a reader must know about nodes that share a host; empty for one node or for real hosts."""
    hosts = {rank.host for rank in kv.ranks}
    if len(commands) == 1 or len(hosts) > 1:
        return ""
    sentence = text["one_host"].format(nodes=len(commands), host=next(iter(hosts)))
    if not all(_is_loopback(c.host) for c in commands):
        return sentence
    spoke = text["loopback_gpu"] if kv.ranks[0].device == "cuda" else text["loopback"]
    return text["sentence_gap"].join((sentence, spoke))


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _warnings(record: RunRecord, text: Text) -> list[str]:
    if not record.warnings:
        return []
    return [f"### {text['warnings']}", "\n".join(f"- {text.said(warning)}" for warning in record.warnings)]


def _commands(record: RunRecord, text: Text) -> list[str]:
    if not record.commands:
        return []
    blocks = []
    for command in record.commands:
        title = text["command_of"].format(rank=command.node_rank, role=role(command.node_rank, text))
        blocks.append(f"# {title}\n{shell_command(command)}")
    return [f"## {text['commands']}", "```bash\n" + "\n\n".join(blocks) + "\n```"]


def shell_command(command: NodeCommandRecord) -> str:
    """The node's command line as a shell takes it, one flag with its value a line."""
    lines = [f"{name}={shlex.quote(value)}" for name, value in command.environment.items()]
    start = next((i for i, word in enumerate(command.argv) if word.startswith("--")), len(command.argv))
    lines.append(" ".join(map(_quoted, command.argv[:start])))
    for word in command.argv[start:]:
        if word.startswith("--"):
            lines.append(f"  {_quoted(word)}")
        else:
            lines[-1] += f" {_quoted(word)}"
    return " \\\n".join(lines)


def _quoted(word: str) -> str:
    """As a shell takes it; a published record's ~ is left for the shell to find the home folder."""
    return f"~/{shlex.quote(word[2:])}" if word.startswith("~/") else shlex.quote(word)


def _validity(record: RunRecord, kv: KVRecord, text: Text) -> list[str]:
    samples = record.samples
    return [f"## {text['validity']}", text["validity_text"], "\n".join(f"- {text.said(rule)}" for rule in record.rules),
            text["validity_plan"].format(plan=kv.plan_hash),
            text["validity_samples"].format(count=samples.count, file=samples.file, sha=samples.sha256[:16])]


def _reproduce(record: RunRecord, text: Text) -> list[str]:
    environment = record.environment
    intro = text["reproduce_text"].format(
        sha=_commit(record, text),
        lock=environment.lock_file or text["not_known"].format(reason=text.said(environment.unknown["lock_file"])),
    )
    parts = [f"## {text['reproduce']}", intro, f"```bash\n{command_line(record, 'force=true')}\n```"]
    return [*parts, text["reproduce_single"]] if record.commands else parts
