"""The paper, ARTIFACT.md and the README's results are made from claims and records, and no result is typed."""

import json
import re

import pytest
import typst
import yaml

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.record import load_record
from kvtuner_sglang.paper.artifact import ARTIFACT_FILE, artifact_text
from kvtuner_sglang.paper.claims import CLAIMS_FILE, load_claims
from kvtuner_sglang.paper.published_folders import PUBLISHED
from kvtuner_sglang.paper.readme import END, START, quality_table, results_text, write_results
from kvtuner_sglang.paper.repeat import published_runs
from kvtuner_sglang.paper.typeset import SOURCE, paper_data, rules_by_task, typeset
from paper_project import QUALITY, ROOT, replace

# Digits that are part of a name or a definition; a result is never one of these words
DEFINITIONS = {
    "1", "2", "4", "8", "16", "64", "128", "16-bit", "4-digit", "8-bit", "0", "SmolLM2-135M",
    "Qwen2.5-Coder-0.5B", "Qwen2.5-7B's", "H100", "float32", "95%", "bf16", "fp16",
}


def prose(source: str) -> str:
    """Typst markup without comments, code, mathematics, raw text, references and labels."""
    for pattern in (r"(?m)//.*$", r"\"[^\"\n]*\"", r"(?s)\$.*?\$", r"`[^`]*`", r"<[\w-]+>", r"@[\w-]+"):
        source = re.sub(pattern, " ", source)
    source = re.sub(r"(?m)^#(let|import|set|show|for|if|include)\b[^\n{(]*", " ", source)
    while (smaller := re.sub(r"\([^()\[\]]*\)", " ", source)) != source:  # arguments and arrays, inside out
        source = smaller
    return re.sub(r"#[\w.-]+", " ", source)


def typed_numbers(source: str) -> set[str]:
    text = re.sub(r"HTTP \d{3}", "", prose(source))
    words = {word.strip("[](){},;:.#*_") for word in text.split() if any(c.isdigit() for c in word)}
    return {word for word in words if word not in DEFINITIONS}


def headings(project) -> str:
    return typst.query(project / SOURCE, "heading", root=project, ignore_system_fonts=True,
                       sys_inputs={"data": json.dumps(paper_data(load_claims(project), project))})


def test_no_result_is_typed():
    sources = [ROOT / SOURCE, *(ROOT / "paper" / "sections").glob("*.typ")]
    assert {path.name: typed for path in sources if (typed := typed_numbers(path.read_text()))} == {}


@pytest.mark.parametrize("line", [
    "It costs 0.0063 nats.", "Recall falls to 57.4% there.", "*It is 147 times as much.*", "- 3.56 times the tokens",
    '#figure(table(), caption: [at 512 tokens])', "#strong[29 of 512]",
])
def test_a_typed_result_is_found(line):
    assert typed_numbers(f"Bits are 8 or 4. {line} SmolLM2-135M at #n(\"kv4-smollm2\", \"kl\").")


def test_the_pdf_repeats_to_the_byte_and_says_the_numbers(project, tmp_path):
    claims = load_claims(project)
    first = typeset(claims, project, tmp_path / "first.pdf").read_bytes()
    assert first.startswith(b"%PDF")
    assert typeset(claims, project, tmp_path / "again.pdf").read_bytes() == first
    replace(project / QUALITY / "summary.csv", "0.00631298", "0.00731298")
    assert typeset(load_claims(project), project, tmp_path / "changed.pdf").read_bytes() != first


def test_a_folder_appears_in_the_paper_once_it_is_published(project, tmp_path):
    file, folder, away = project / CLAIMS_FILE, project / "runs" / "published" / "forensics", project / "taken_back"
    text = file.read_text()
    tree = yaml.safe_load(text)
    tree["claims"] = [claim for claim in tree["claims"] if not claim["id"].startswith("forensics-")]
    file.write_text(yaml.safe_dump(tree))
    folder.rename(away)
    before = headings(project)
    assert "An earlier report" not in before
    assert "What a format costs a model" in before
    without = typeset(load_claims(project), project, tmp_path / "without.pdf").read_bytes()
    file.write_text(text)
    away.rename(folder)
    assert "An earlier report, examined" in headings(project)
    assert len(typeset(load_claims(project), project, tmp_path / "with.pdf").read_bytes()) > len(without)


def test_a_source_that_typst_refuses_is_one_sentence(project):
    replace(project / SOURCE, "= Results", "#unknown-name\n= Results")
    with pytest.raises(UserError, match="cannot be typeset: unknown variable: unknown-name") as caught:
        typeset(load_claims(project), project)
    assert "\n" not in str(caught.value)
    replace(project / SOURCE, "#unknown-name\n", "")
    replace(project / "paper" / "sections" / "abstract.typ", '"bits"', '"weight"')
    with pytest.raises(UserError, match="weight"):
        typeset(load_claims(project), project)


def test_artifact_md_is_current():
    assert (ROOT / ARTIFACT_FILE).read_text() == artifact_text(load_claims(ROOT), ROOT)


def test_the_readmes_results_are_current():
    text = (ROOT / "README.md").read_text()
    assert text.split(START)[1].split(END)[0] == f"\n{results_text(load_claims(ROOT), ROOT)}\n"


@pytest.mark.parametrize(("old", "new", "part"), [
    ("qwen2.5-coder-0.5b,kv4,", "qwen2.5-coder-0.5b,kv5,", "KeyError"),
    ("top1_agreement", "top_agreement", "KeyError"),
    ("0.00631298", "none", "ValueError"),
    (",float32,", ",bfloat16,", "full precision is bfloat16, float32, not one of"),
])
def test_a_quality_table_that_does_not_suffice_is_one_sentence(project, old, new, part):
    replace(project / QUALITY / "summary.csv", old, new)
    with pytest.raises(UserError, match=f"cannot be put into README.md .*{part}") as caught:
        quality_table(project)
    assert "\n" not in str(caught.value)


def test_full_precision_is_what_the_records_say(project):
    assert "| full precision | 32 " in quality_table(project)
    table = project / QUALITY / "summary.csv"
    table.write_text(table.read_text().replace(",float32,", ",bfloat16,"))
    assert "| full precision | 16 " in quality_table(project)


def test_the_papers_rules_are_those_that_every_run_of_a_task_held(project):
    path = next(project.glob("runs/published/ablation/*-kv4-single-*/record.json"))
    record = json.loads(path.read_text())
    whole = rules_by_task(project)
    assert set(whole) == {load_record(project / PUBLISHED / run).config["task"] for run in published_runs(project)}
    assert "The server answered, and answered 200." in whole["serve"]
    assert all("200" not in rule for rule in whole["quality"])
    record["rules"] = [rule for rule in record["rules"] if not rule.startswith("http_200")]
    path.write_text(json.dumps(record))
    assert rules_by_task(project)["serve"] == [rule for rule in whole["serve"] if "200." not in rule]


def test_results_are_put_between_their_marks(project):
    readme = project / "README.md"
    text = readme.read_text()
    replace(project / QUALITY / "summary.csv", "0.00631298", "0.00731298")
    write_results(load_claims(project), project)
    changed = readme.read_text()
    assert changed != text
    assert changed.split(START)[0] == text.split(START)[0]
    assert changed.split(END)[1] == text.split(END)[1]
    assert "costs 0.0073 nats" in changed
    readme.write_text(text.replace(START, ""))
    with pytest.raises(UserError, match="no place for the results"):
        write_results(load_claims(project), project)
