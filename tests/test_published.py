"""What is published is whole, and its tables are those that its records give."""

import hashlib
from pathlib import Path

import pytest

from kvtuner_sglang.ablation import publish as ablation_publish
from kvtuner_sglang.ablation import tidy as ablation_tidy
from kvtuner_sglang.agreement import publish as agreement
from kvtuner_sglang.agreement import tidy as agreement_table
from kvtuner_sglang.evidence.published import publishable, slug
from kvtuner_sglang.kernel_bench.tidy import FLOAT_FORMAT, gpu_of, table_of_run
from kvtuner_sglang.quality.summary import CSV_FILE, summarize
from kvtuner_sglang.speed.publish import published
from kvtuner_sglang.speed.tidy import table_of, to_csv
from kvtuner_sglang.tuner import publish as tuner

PUBLISHED = Path(__file__).parents[1] / "runs" / "published"
KERNELS = sorted(path.parent for path in PUBLISHED.glob("kernels/*/record.json"))
FOLDERS = sorted(path.parent for path in PUBLISHED.glob("*/SHA256SUMS"))


def test_every_published_folder_has_checksums():
    assert FOLDERS
    assert [path for path in PUBLISHED.iterdir() if path.is_dir() and path not in FOLDERS] == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_checksums_cover_every_file_and_hold(folder):
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split(maxsplit=1) for line in lines)}
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    del files["SHA256SUMS"]
    assert set(sums) == set(files)
    for name, path in files.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sums[name], name


def test_the_quality_table_is_what_the_records_give():
    folder = PUBLISHED / "quality"
    assert (folder / CSV_FILE).read_text() == summarize(folder).to_csv(index=False, float_format="%.6g")


@pytest.mark.parametrize("run_dir", KERNELS, ids=lambda path: path.name)
def test_the_kernels_table_is_what_the_record_gives(run_dir):
    record = publishable(run_dir, "kernels")
    assert run_dir.name == slug(gpu_of(record))
    frame = table_of_run(run_dir, record)
    assert run_dir.with_suffix(".csv").read_text() == frame.to_csv(index=False, float_format=FLOAT_FORMAT)


def test_every_kernels_table_has_its_run():
    tables = {path.stem for path in PUBLISHED.glob("kernels/*.csv")}
    assert tables == {run_dir.name for run_dir in KERNELS}


def test_the_engine_tables_are_what_the_records_give():
    folder = PUBLISHED / "engine"
    records = published(folder)
    tables = {path.stem: path.read_text() for path in folder.glob("*.csv")}
    given = {slug(str(gpu)): to_csv(rows) for gpu, rows in table_of(records).groupby("gpu")} if records else {}
    assert tables == given


def test_the_ablation_tables_are_what_the_records_give():
    folder = PUBLISHED / "ablation"
    tables = {path.stem: path.read_text() for path in folder.glob("*.csv")}
    frame = ablation_tidy.table_of(ablation_publish.published(folder))
    assert tables == {slug(str(machine)): ablation_tidy.to_csv(rows) for machine, rows in frame.groupby("machine")}


def test_the_agreement_table_is_what_the_records_give():
    folder = PUBLISHED / "agreement"
    records = agreement.published(folder)
    tables = [path.read_text() for path in folder.glob("*.csv")]
    assert tables == ([agreement_table.to_csv(agreement_table.table_of(records))] if records else [])


def test_the_tuner_table_is_what_the_records_give():
    folder = PUBLISHED / "tuner"
    tables = [path.read_text() for path in folder.glob("*.csv")]
    assert tables == (list(tuner.tables(folder).values()) if any(folder.glob("tune-*")) else [])
