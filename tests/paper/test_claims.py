"""What is claimed follows from what is published, and whatever drifts apart is named."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.published import write_sums
from kvtuner_sglang.paper.check import claim_problems, folder_problems, problems
from kvtuner_sglang.paper.claims import Number, load_claims, written
from kvtuner_sglang.paper.published_folders import FOLDERS, published_folders
from kvtuner_sglang.tasks import claims as task
from paper_project import QUALITY, ROOT, replace

KV4 = QUALITY / "quality-smollm2_135m-kv4-single-standard-cb8461f356"


def wrong(project: Path) -> list[str]:
    return list(problems(load_claims(project), published_folders(project), project))


def change(project: Path, old: str, new: str) -> None:
    replace(project / "paper" / "claims.yaml", old, new)


def test_every_claim_holds_from_the_command_line():
    done = subprocess.run([sys.executable, "run.py", "task=claims"], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    claims = load_claims(ROOT).claims
    assert done.stdout.count("  holds  ") == len(claims) > 10
    assert f"all {len(claims)} claims hold" in done.stdout


def test_every_folder_has_its_tables_maker_and_every_command_is_of_this_project():
    assert {folder.name for folder in published_folders(ROOT)} <= FOLDERS.keys()
    claims = load_claims(ROOT)
    assert {word for claim in claims.claims for word in claim.commands} == set(claims.commands("sweep"))
    for tier in claims.tiers:
        assert claims.commands(tier)
        for command in claims.commands(tier):
            words = shlex.split(command)
            assert words[:2] == ["python", "run.py"] or (words[:2] == ["python", "-m"] and find_spec(words[2]))


@pytest.mark.parametrize("file", [KV4 / "record.json", KV4 / "requests.jsonl", QUALITY / "summary.csv",
                                  QUALITY / "recipes-smollm2_135m.json"])
def test_one_digit_fails(project, file):
    path = project / file
    text = path.read_text()
    place = text.rindex("7")
    path.write_text(f"{text[:place]}8{text[place + 1:]}")
    with pytest.raises(UserError, match="hold: see the lines above"):
        task.run(lambda line: None, project)
    assert f"{path} is not the file that SHA256SUMS lists." in wrong(project)


def test_a_record_whose_checksum_was_made_to_fit_fails(project):
    path = project / KV4 / "record.json"
    record = json.loads(path.read_text())
    record["metrics"]["kl_nats"]["mean"] += 1e-6
    path.write_text(json.dumps(record))
    write_sums(project / QUALITY)
    assert wrong(project) == [f"{project / QUALITY / 'summary.csv'} is not the table that the records beside it give: "
                              "publish it again."]


def test_a_table_whose_checksum_was_made_to_fit_fails(project):
    replace(project / QUALITY / "summary.csv", "0.00631298", "0.00631299")
    write_sums(project / QUALITY)
    [sentence] = wrong(project)
    assert "is not the table that the records beside it give" in sentence


def test_samples_whose_checksum_was_made_to_fit_fail(project):
    samples = project / KV4 / "requests.jsonl"
    samples.write_text(samples.read_text().replace('"right": true', '"right": false', 1))
    write_sums(project / QUALITY)
    assert wrong(project) == [f"{samples} is not what the record says: repeat the run with force=true."]


def test_a_record_that_names_a_folder_of_its_machine_fails(project):
    path = project / KV4 / "record.json"
    path.write_text(path.read_text().replace('"~/', '"/home/someone/', 1))
    write_sums(project / QUALITY)
    assert wrong(project) == [f"{path} names folders of the machine that it was made on: publish it again."]


def test_a_run_that_did_not_end_well_fails(project):
    path = project / KV4 / "record.json"
    record = json.loads(path.read_text())
    record |= {"status": "invalid", "reason": "cold_cache: a test", "metrics": {}, "rules": [], "kv": None,
               "unknown": {"kv": "a test"}}
    path.write_text(json.dumps(record))
    write_sums(project / QUALITY)
    assert any("is invalid (cold_cache: a test)" in sentence for sentence in wrong(project))


TWO_MACHINES = """model,dist,quant,kv_tokens,ttft_p50_ms,output_tok_s,tpot_floor_ms
a,single,bf16,10,2,4,1.5
a,single,kv4,30,3,5,1.6
a,single,kv8,20,4,6,1.5
a,single,kv2,20,4,6,
a,tp2,kv4,60,5,7,0.8
b,single,kv4,60,5,8,2.5
"""


@pytest.mark.parametrize(("column", "where", "over", "value"), [
    ("kv_tokens", {"quant": "kv4"}, {"quant": "bf16"}, 3),
    ("output_tok_s", {"quant": "kv8"}, {"quant": "bf16"}, 1.5),
    ("output_tok_s", {"quant": "kv2"}, {"quant": "bf16"}, 1.5),  # where it is not known it tells nothing
    ("output_tok_s", {"quant": "kv4", "dist": "tp2"}, {"dist": "single"}, 1.4),  # nor of two layouts
    ("output_tok_s", {"quant": "kv4", "model": "b"}, {"model": "a"}, 1.6),  # nor of two models
    ("output_tok_s", {"quant": "kv4"}, {"quant": "bf16"}, None),
    ("ttft_p50_ms", {"quant": "kv4"}, {"quant": "bf16"}, None),
])
def test_a_ratio_of_times_from_two_machines_fails(tmp_path, column, where, over, value):
    table = tmp_path / "runs" / "published" / "x" / "m.csv"
    table.parent.mkdir(parents=True)
    table.write_text(TWO_MACHINES)
    number = Number(csv="x/m.csv", where={"model": "a", "dist": "single"} | where, column=column,
                    over={"where": over, "column": column}, show=".2f")
    if value is not None:
        assert number.read(tmp_path) == value
        return
    with pytest.raises(UserError, match="of two machines of a kind"):
        number.read(tmp_path)


def test_files_that_are_not_listed_or_gone_are_named(project):
    (project / QUALITY / "more.txt").write_text("x")
    (project / QUALITY / "README.md").unlink()
    assert [sentence.split("/")[-1] for sentence in wrong(project)] == [
        "README.md is listed, yet missing, in SHA256SUMS.", "more.txt is not listed in SHA256SUMS."]


@pytest.mark.parametrize(("old", "new", "part"), [
    ("band: [0.0053, 0.0073]", "band: [0.0053, 0.0063]", "kl is 0.00631298, outside of its band from 0.0053 to 0.0063"),
    ("quant: kv4, engine: sglang", "quant: kv5, engine: sglang", "has 0 rows with"),
    ("{model: smollm2_135m, quant: kv4, engine: sglang}", "{model: smollm2_135m, engine: sglang}", "has 3 rows with"),
    ("column: kl_se", "column: engine", "no number in column engine"),
    ("csv: quality/summary.csv", "csv: quality/other.csv", "cannot be read"),
    ("-standard-6979169161/record", "-standard-0000000000/record", "has no number at kv capacity_ratio"),
    ("exp=quality quant=kv8,kv4,kv4_token model=smollm2_135m", "exp=quality quant=kv8 model=smollm2_135m", "holds"),
    ("[kv, capacity_ratio]", "[kv, nothing]", "has no number at kv nothing"),
])
def test_a_claim_that_drifts_from_what_is_published(project, old, new, part):
    replaced = (project / "paper" / "claims.yaml").read_text().replace(old, new)
    (project / "paper" / "claims.yaml").write_text(replaced)
    if part == "holds":
        part = "its commands repeat no run configured as quality/quality-smollm2_135m-kv4-single"
    assert any(part in sentence for sentence in wrong(project))


def test_an_exp_file_that_drifts_from_the_records(project):
    (project / "conf").unlink()
    shutil.copytree(ROOT / "conf", project / "conf")
    replace(project / "conf" / "exp" / "quality.yaml", "override /quality: standard", "override /quality: small")
    found = wrong(project)
    runs = {run for claim in load_claims(project).claims for run in claim.sources(project) if "/quality-" in run}
    assert {part.split(" was")[0] for sentence in found if (part := sentence.partition("configured as ")[2])} == runs
    assert {run for run in runs if f"{run} is published, but no claim's command repeats it: add one in "
            "paper/claims.yaml." in found} == runs


@pytest.mark.parametrize(("claim", "kept", "unrepeated"), [
    ("engine-decode", 0, "speed-qwen2_5_7b_dummy-fp8-single"),
    ("engine-first-token", 1, "speed-qwen2_5_7b_dummy-bf16-single-auto"),
    ("engine-other-formats", 1, "speed-qwen2_5_7b_dummy-bf16-single-auto"),
    ("stress-kv8", 1, "quality-smollm2_135m-kv8-single"),
])
def test_every_row_that_a_number_is_read_from_is_repeated(claim, kept, unrepeated):
    """Also the row that it is divided by."""
    claim = next(one for one in load_claims(ROOT).claims if one.id == claim)
    assert list(claim_problems(claim, ROOT)) == []
    short = claim.model_copy(update={"commands": claim.commands[kept:kept + 1]})
    assert any(f"repeat no run configured as {claim.folder}/{unrepeated}" in found
               for found in claim_problems(short, ROOT))


def test_a_command_that_repeats_nothing_of_a_claim_is_named():
    claim = load_claims(ROOT).claims[0]
    more = claim.model_copy(update={"commands": (*claim.commands, "python run.py task=kernels kernels.repeats=5")})
    assert list(claim_problems(more, ROOT)) == [
        "claim kv4-smollm2: nothing that it rests on is repeated by python run.py task=kernels kernels.repeats=5."]
    other = claim.model_copy(update={"commands": ("make run",)})
    assert any("make run is no command of run.py" in found for found in claim_problems(other, ROOT))


@pytest.mark.parametrize("text", ["one_word\n", "\xff\xfe\n"])
def test_a_list_of_checksums_that_is_none_is_one_sentence(project, text):
    path = project / QUALITY / "SHA256SUMS"
    path.write_text(text, encoding="latin-1")
    assert list(folder_problems(path.parent)) == [
        f"{path} has a line that is no checksum with a file's name: publish it again."]


def test_a_published_folder_needs_a_claim(project):
    new = project / "runs" / "published" / "newcomer"
    new.mkdir()
    (new / "README.md").write_text("nothing claimed\n")
    write_sums(new)
    assert wrong(project) == []  # it waits for its first run
    (new / "table.csv").write_text("kernel,median_us\n")
    write_sums(new)
    assert wrong(project) == [f"{new} is published, but no claim rests on it: write one in paper/claims.yaml."]


def test_a_ratio_of_two_rows_and_a_number_of_a_record(tmp_path):
    folder = tmp_path / "runs" / "published" / "kernels"
    folder.mkdir(parents=True)
    (folder / "card.csv").write_text("kernel,format,batch,median_us\nkvtuner,kv4,16,100\nflashinfer,bf16,16,370\n"
                                     "flashinfer,bf16,1,45\n")
    (folder / "record.json").write_text('{"metrics": {"ttft_ms/prompt_tokens=10": {"p50": 12.5}}, "list": [1, 2]}')
    where = {"kernel": "flashinfer", "format": "bf16", "batch": 16}
    speedup = Number(csv="kernels/card.csv", where=where, column="median_us", show=".2f",
                     over={"where": {"kernel": "kvtuner", "format": "kv4"}, "column": "median_us"})
    assert speedup.text(speedup.read(tmp_path)) == "3.70"
    ttft = Number(record="kernels/record.json", path=["metrics", "ttft_ms/prompt_tokens=10", "p50"], show=".1f")
    assert ttft.read(tmp_path) == 12.5
    assert Number(record="kernels/record.json", path=["list", 1], show=".0f").read(tmp_path) == 2
    assert speedup.text(-3.0) == "\N{MINUS SIGN}3.00"
    assert (written(0.99725, ".2%"), written(0.9535, ".1%"), written(4000.0, ",.0f")) == ("99.73%", "95.4%", "4,000")


@pytest.mark.parametrize(("old", "new", "part"), [
    ("claims:\n", "claims:\n  - {id: x}\n", "claims.0.sentence"),
    ("id: kv4-qwen\n", "id: kv4-smollm2\n", "two claims are called kv4-smollm2"),
    ("(standard\n      error {se}, ", "(", "does not say se"),
    ("tier: gpu", "tier: moon", "tier"),
    ("band: [4.5, 4.5]}", "bnad: [4.5, 4.5]}", "bnad"),
    ("tiers:", "tiers: [", "must be YAML"),
])
def test_a_claims_file_that_is_wrong_is_one_sentence(project, old, new, part):
    change(project, old, new)
    with pytest.raises(UserError, match=part.replace(".", r"\.")) as caught:
        load_claims(project)
    assert "\n" not in str(caught.value)


def test_a_sentence_cannot_say_a_number_that_is_not_read(project):
    change(project, "{n} tokens of prose", "{n} tokens of prose in {pages} pages")
    assert "claim kv4-smollm2: claim kv4-smollm2 says {pages}, which is no number of it: add one." in wrong(project)


def test_sentences_type_no_result():
    """Digits of a sentence stand in names and definitions; every other number is read."""
    allowed = {"SmolLM2-135M", "Qwen2.5-Coder-0.5B", "kv4", "kv8", "kv2", "kv8_token", "kv4_token", "(kv4_token)",
               "k4v2", "(k4v2)", "(k8v4)", "95%", "(95%", "float32", "bf16", "fp8", "Qwen2.5-7B", "H100",
               "H100s"}
    for claim in yaml.safe_load((ROOT / "paper" / "claims.yaml").read_text())["claims"]:
        sentence = re.sub(r"HTTP \d{3}", "", claim["sentence"])
        typed = {word.rstrip(",:;.").removesuffix("'s") for word in sentence.split() if any(c.isdigit() for c in word)}
        assert {word for word in typed if "{" not in word} <= allowed, claim["id"]
