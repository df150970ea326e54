"""report.language=zh: the same report with the same numbers, and nothing in it that is English but names and units."""

import re
from collections import Counter
from collections.abc import Callable
from string import Formatter
from types import SimpleNamespace

import pytest

from kvtuner_sglang.display_width import display_width
from kvtuner_sglang.evidence.environment import busy_warnings
from kvtuner_sglang.evidence.record import RunRecord
from kvtuner_sglang.measure import validity
from kvtuner_sglang.quant import KVFormat, TensorFormat
from kvtuner_sglang.report import text_en, text_zh
from kvtuner_sglang.report.language import TEXTS
from kvtuner_sglang.report.markdown import render
from kvtuner_sglang.serving.dummy_checkpoint import RANDOM_WEIGHTS

RUN = ("quant=kv4", "dist=tp2pp2", "workload=seed_report")
NAMES = {  # of programs, formats, hosts, variables, hashes and units, which have no other name in Chinese
    "KVTuner", "SGLang", "sglang", "TTFT", "TPOT", "KV", "GPU", "HTTP", "K", "V", "Key", "Value", "bit", "TP", "PP",
    "NNODES", "LlamaForCausalLM", "M", "float32", "smollm2_135m", "sha256", "head_dim", "PackedKVPool",
    "MHATokenToKVPool", "kv2", "kv4", "kv8", "bf16", "kv4_token", "fp8_e4m3", "ms", "MiB", "req", "tok", "s", "n",
    "p50", "p90", "p99", "SLO", "t", "concurrency", "turn", "rate_per_s", "ttft_ms", "tpot_ms", "itl_ms", "e2e_ms",
    "requests_per_s", "output_tokens_per_s", "output_tokens_per_s_per_device", "goodput_per_s", "slo_share",
    "ttft_p50_ms", "tpot_p50_ms", "cached_tokens", "retractions", "pid", "gloo", "NCCL", "cpu",
    "test", "host", "Test", "CPU", "a",  # the last of this test's machine
}


def english(report: str) -> set[str]:
    """Latin words outside of code that are no names."""
    prose = re.sub(r"```.*?```|`[^`]*`", " ", report, flags=re.DOTALL)
    prose = re.sub(r"\b[0-9a-f]{10,}\b|\b\d{4}-\d\d-\d\dT", " ", prose)  # hashes and times
    return {word for word in re.findall(r"[A-Za-z]\w*", prose) if not re.fullmatch(r"[PT]P\d", word)} - NAMES


def diagram(report: str) -> str:
    [drawing] = re.findall(r"```\n(┌.*?)\n```", report, re.DOTALL)
    return drawing


def numbers(report: str) -> Counter[str]:
    return Counter(re.findall(r"\d+(?:\.\d+)?", report))


def in_chinese(record: RunRecord) -> RunRecord:
    return record.model_copy(update={"config": {**record.config, "report": {"language": "zh"}}})


@pytest.fixture
def record(make_run: Callable[..., RunRecord]) -> RunRecord:
    """A run with every rule of today and each warning."""
    busy = SimpleNamespace(cpu_busy_percent=73.4)
    warnings = [RANDOM_WEIGHTS, *busy_warnings(busy), *validity.monotone_warnings({10: 100.0, 1000: 20.5})]
    return make_run(*RUN).model_copy(update={"rules": validity.rules_held(), "warnings": tuple(warnings)})


def test_both_languages_have_the_same_phrases_and_fields() -> None:
    assert list(text_en.TEXT.keys() ^ text_zh.TEXT.keys()) == []
    for key, phrase in text_en.TEXT.items():
        fields = {name for _, name, _, _ in Formatter().parse(phrase) if name}
        assert {name for _, name, _, _ in Formatter().parse(text_zh.TEXT[key]) if name} == fields, key


@pytest.mark.parametrize("status", ["ok", "failed"])
def test_the_same_numbers_in_the_same_sections(make_run: Callable[..., RunRecord], record: RunRecord,
                                               status: str) -> None:
    this = record if status == "ok" else make_run(*RUN, status=status)
    others = [make_run("quant=bf16", *RUN[1:]), make_run("quant=kv8", *RUN[1:], status="failed")]
    here, there = render(in_chinese(this), others), render(this, others)
    assert numbers(here) == numbers(there)
    marks = [re.findall(r"^(#+ |\||```|- )", text, re.MULTILINE) for text in (here, there)]
    assert marks[0] == marks[1]
    assert here.count("\n") == there.count("\n")


def test_no_word_is_english(make_run: Callable[..., RunRecord], record: RunRecord) -> None:
    others = [make_run("quant=bf16", *RUN[1:]), make_run("quant=kv8", *RUN[1:], sha="b" * 40)]
    here = render(in_chinese(record), others)
    assert english(here) == set()
    assert english(diagram(here)) == set()
    assert len(english(render(record, others))) > 100


@pytest.mark.parametrize("changes", [("dist=single", "quant=bf16"), ("dist=tp2", "quant=kv4_token")])
def test_other_runs(make_run: Callable[..., RunRecord], changes: tuple[str, ...]) -> None:
    assert english(render(in_chinese(make_run(*changes)))) == set()


@pytest.mark.parametrize("name", ["closed", "open", "longctx", "multiturn", "capacity"])
def test_loads(make_run: Callable[..., RunRecord], name: str) -> None:
    run = make_run("quant=kv4_token", f"workload={name}")
    here, there = render(in_chinese(run)), render(run)
    assert english(here) == set()
    assert numbers(here) == numbers(there)


def test_every_rule_is_known() -> None:
    for rule in validity.rules_held():
        said = TEXTS["zh"].said(rule)
        assert said != f"`{rule}`", rule
        assert f"`{rule.partition(':')[0]}`" in said


@pytest.mark.parametrize("fmt", [
    KVFormat(TensorFormat(4, axis=1, boosted=True), TensorFormat(4, symmetric=True)),
    KVFormat(TensorFormat(8, axis=1), TensorFormat(2, 32)),
    KVFormat(TensorFormat(16), TensorFormat(8, 64, symmetric=True)),
])
def test_every_format_is_known(fmt: KVFormat) -> None:
    said = TEXTS["zh"].said(fmt.describe())
    assert english(said) == set()
    assert "`" not in said
    assert numbers(said) == numbers(fmt.describe())


def test_what_is_not_known_is_quoted(make_run: Callable[..., RunRecord]) -> None:
    """An error is a program's own words, in either language."""
    here = render(in_chinese(make_run(*RUN, status="failed")))
    assert "本次运行**失败**，不发布任何数据。原因：`rank 3 on node 1 died`" in here
    assert english(here) == set()
    assert TEXTS["en"].said("rank 3 died") == "rank 3 died"


def test_columns_are_aligned_as_shown(record: RunRecord) -> None:
    here = render(in_chinese(record))
    assert len({display_width(line) for line in diagram(here).splitlines()}) == 1
    for block in re.findall(r"(?:^\|.*\n)+", here, re.MULTILINE):
        assert len({display_width(line) for line in block.splitlines()}) == 1
