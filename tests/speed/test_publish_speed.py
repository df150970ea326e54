"""Records -> one table a GPU, with checksums, and its figure from the table alone."""

import csv
import hashlib

import pytest

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.record import load_record
from kvtuner_sglang.figure_style import save
from kvtuner_sglang.speed.decode_figure import figures
from kvtuner_sglang.speed.publish import publish, tables
from kvtuner_sglang.speed.tidy import backend_of

COLUMNS = ["gpu", "model", "dist", "quant", "backend", "workload", "batch", "context", "kv_tokens", "decode_tok_s",
           "ttft_ms", "tpot_ms", "commit", "run"]


@pytest.fixture
def folder(tmp_path, run_dir):
    runs = [run_dir("speed-a", quant="kv4"), run_dir("speed-b", quant="bf16", factor=0.5),
            run_dir("speed-c", quant="bf16", backend="triton", factor=0.4), run_dir("speed-d", quant="fp8")]
    publish(runs, tmp_path / "engine")
    return tmp_path / "engine"


def test_the_table_has_exactly_the_columns_and_a_row_a_cell(folder):
    with (folder / "test_gpu_80gb.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    assert len(rows) == 4 * 5
    kv4 = {(row["workload"], row["batch"]): row for row in rows if row["quant"] == "kv4"}
    decode = kv4["decode", "48"]
    assert (decode["gpu"], decode["model"], decode["dist"], decode["backend"]) == (
        "Test GPU 80GB", "m", "single", "kvtuner")
    assert (decode["decode_tok_s"], decode["tpot_ms"], decode["ttft_ms"]) == ("100", "10", "")
    assert (decode["kv_tokens"], decode["commit"], decode["context"]) == ("1000", "abcdefabcdef", "16384")
    assert kv4["saturation", "90"]["decode_tok_s"] == "100"
    ttft = kv4["ttft", "1"]
    assert (ttft["context"], ttft["ttft_ms"], ttft["decode_tok_s"], ttft["tpot_ms"]) == ("1000", "30", "", "")
    assert kv4["ttft_cached_16384", "1"]["context"] == "16896"
    assert {row["backend"] for row in rows if row["quant"] == "bf16"} == {"flashinfer", "triton"}


def test_table_and_checksums_come_back(folder):
    assert tables(folder) == {"test_gpu_80gb.csv": (folder / "test_gpu_80gb.csv").read_text()}
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split(maxsplit=1) for line in lines)}
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(sums) == files - {"SHA256SUMS"}
    for name, digest in sums.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert {"test_gpu_80gb.csv", "speed-a/record.json"} <= files


def test_the_figure_comes_from_the_table_alone_and_repeats_to_the_byte(folder, tmp_path):
    def drawn():
        [(name, figure)] = figures(folder).items()
        return {path.name: path.read_bytes() for path in save(figure, tmp_path, name)}

    path = folder / "test_gpu_80gb.csv"
    first = drawn()
    assert set(first) == {"test_gpu_80gb_decode.pdf", "test_gpu_80gb_decode.png"}
    assert drawn() == first
    path.write_text(path.read_text().replace(",100,", ",300,"))
    assert drawn()["test_gpu_80gb_decode.png"] != first["test_gpu_80gb_decode.png"]


def test_every_format_and_backend_has_a_bar_of_its_own(folder):
    [figure] = figures(folder).values()
    for ax in figure.axes:
        labels = [label.get_text() for label in ax.get_xticklabels()]
        assert [label.split("\n")[:2] for label in labels] == [
            ["bf16", "FlashInfer"], ["bf16", "Triton"], ["fp8", "FlashInfer"], ["kv4"]] or "requests" in labels[-1]
        assert len(ax.patches) == len(labels) == len(set(labels))


def test_a_run_of_the_same_name_is_replaced_and_a_second_of_the_same_cells_refused(folder, run_dir, tmp_path):
    again = run_dir("again/speed-a", quant="kv4", commit="c" * 40)
    publish([again], folder)
    assert "c" * 12 in (folder / "test_gpu_80gb.csv").read_text()
    before = (folder / "test_gpu_80gb.csv").read_bytes()
    with pytest.raises(UserError, match="two runs measured kv4"):
        publish([run_dir("speed-twin", quant="kv4")], folder)
    assert (folder / "test_gpu_80gb.csv").read_bytes() == before


@pytest.mark.parametrize(("changes", "part"), [
    ({"status": "invalid"}, "is invalid"),
    ({"device": "cpu"}, "ran on no GPU"),
    ({"dirty": True}, "no commit describes"),
])
def test_what_may_not_be_published_is_refused(run_dir, tmp_path, changes, part):
    with pytest.raises(UserError, match=part):
        publish([run_dir("speed-x", **changes)], tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_changed_samples_are_refused(run_dir, tmp_path):
    run = run_dir("speed-x")
    (run / "requests.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="not what the record says"):
        publish([run], tmp_path / "engine")


def test_the_backend_is_the_one_that_the_engine_named(run_dir):
    record = load_record(run_dir("speed-x", quant="bf16"))
    (rank,) = record.kv.ranks
    other = record.kv.model_copy(update={"ranks": (rank.model_copy(update={"attention": "triton"}),)})
    assert backend_of(record) == "flashinfer"
    assert backend_of(record.model_copy(update={"kv": other})) == "triton"
