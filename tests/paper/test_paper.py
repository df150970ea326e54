"""The paper, ARTIFACT.md and the README's results are made from claims and records, and no result is typed."""

import json
import re
import shutil

import pytest
import typst

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.published import write_sums
from kvtuner_sglang.paper.artifact import ARTIFACT_FILE, artifact_text
from kvtuner_sglang.paper.claims import load_claims
from kvtuner_sglang.paper.readme import END, START, results_text, write_results
from kvtuner_sglang.paper.typeset import SOURCE, paper_data, typeset
from paper_project import QUALITY, ROOT, replace

# Digits that are part of a name or a definition; a result is never one of these words
DEFINITIONS = {
    "1", "2", "4", "8", "16", "64", "128", "16-bit", "4-digit", "8-bit", "0", "SmolLM2-135M",
    "Qwen2.5-Coder-0.5B", "float32", "95%", "bf16", "fp16",
}
RECORD = QUALITY / "quality-smollm2_135m-kv4-single-standard-cb8461f356"


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
    before = headings(project)
    assert "An earlier report" not in before
    assert "What a format costs a model" in before
    forensics = project / "runs" / "published" / "forensics"
    shutil.copytree(project / RECORD, forensics / "run")
    (forensics / "paragraph.md").write_text("The earlier figures were error pages.\n")
    (forensics / "forensics.csv").write_text("run,test,level,series,mean\nrun,ttft,10,claimed by the seed report,2.55\n"
                                             'run,ttft,10,"node 1, HTTP 404",2.6\n')
    write_sums(forensics)
    claim = """
  - id: seed-404
    sentence: An error page took {ms} ms.
    numbers:
      ms: {record: forensics/run/record.json, path: [metrics, kl_nats, mean], show: .4f, band: [0, 1]}
    command: python run.py
    hardware: a CPU
    tier: sweep
"""
    with (project / "paper" / "claims.yaml").open("a") as file:
        file.write(claim)
    assert "An earlier report, examined" in headings(project)
    pages = typeset(load_claims(project), project, tmp_path / "with.pdf")
    assert len(pages.read_bytes()) > 1000


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
