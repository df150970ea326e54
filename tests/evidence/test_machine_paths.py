"""Published files name no folder of the machine that made them, and say the same otherwise."""

import json
from pathlib import Path

import pytest

from kvtuner_sglang.evidence.machine_paths import forget_machine_paths, has_machine_paths, without_machine_paths
from kvtuner_sglang.evidence.published import publishable
from kvtuner_sglang.evidence.record import RECORD_FILE, file_sha256, load_record, write_record
from kvtuner_sglang.evidence.samples import SAMPLES_FILE
from serve_records import metric, write_run

FOLDERS = {"/home/someone": "~", "/home/someone/project": "."}


@pytest.mark.parametrize(("text", "kept"), [
    ("/home/someone/project/.venv/bin/python", "./.venv/bin/python"),
    ("/home/someone/project", "."),
    ("model.path=/home/someone/models/small", "model.path=~/models/small"),
    ("PYTHONPATH=/home/someone/site:/home/someone/project/src", "PYTHONPATH=~/site:./src"),
    ("/home/someone/project-2/run.py", "~/project-2/run.py"),
    ("/home/someone2/x /mnt/home/someone/x", "/home/someone2/x /mnt/home/someone/x"),
    ("https://example.org/home/someone/x", "https://example.org/home/someone/x"),
])
def test_only_whole_folders_are_renamed(text, kept):
    assert without_machine_paths(text, FOLDERS) == kept


@pytest.mark.parametrize(("text", "named"), [
    ('"/root/x"', True), ("a=/home/x", True), ("/Users/x", True), (str(Path(__file__).parents[2] / "run.py"), True),
    ("~/x ./y /usr/bin/python3", False), ("runs/home/x", False),
])
def test_which_texts_name_one(text, named):
    assert has_machine_paths(text) is named


def test_a_run_stays_publishable_and_the_same_otherwise(tmp_path):
    run_dir = write_run(tmp_path, ["exp=ablation", "quant=kv4"], {"ttft_ms/prompt_tokens=10": metric(1.0, "ms")})
    samples, record = run_dir / SAMPLES_FILE, load_record(run_dir)
    samples.write_text(samples.read_text() + json.dumps({"model_path": f"{tmp_path}/small"}) + "\n")
    said = record.samples.model_copy(update={"sha256": file_sha256(samples)})
    write_record(run_dir, before := record.model_copy(update={"samples": said}))

    forget_machine_paths(run_dir, {str(tmp_path): "~"})

    after = publishable(run_dir, "serve")
    assert str(tmp_path) not in (run_dir / RECORD_FILE).read_text() + samples.read_text()
    assert after.config["runs_dir"] == "~"
    assert json.loads(samples.read_text().splitlines()[-1]) == {"model_path": "~/small"}
    changed = {"config", "overrides", "samples"}
    assert after.model_dump(exclude=changed) == before.model_dump(exclude=changed)
    assert {**after.config, "runs_dir": before.config["runs_dir"]} == before.config
