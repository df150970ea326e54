"""Records -> one table with checksums; no figure in them was measured."""

import csv
import hashlib

import pytest

from kvtuner_sglang.agreement.publish import publish, published
from kvtuner_sglang.agreement.tidy import table_of
from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.record import (
    Environment,
    KVRecord,
    ModelRecord,
    RankRecord,
    RunRecord,
    SamplesFile,
    Tracking,
    file_sha256,
    write_record,
)
from kvtuner_sglang.evidence.tidy_tables import to_csv
from kvtuner_sglang.measure.metrics import summarize


def made_up(name: str, *, quant: str = "kv4", dtype: str = "float32", floor: bool = True, device: str = "cuda:0",
            dirty: bool = False) -> RunRecord:
    metrics = {"prompts": summarize([32], "texts")}
    layouts = (["single_with_noise"] if floor else []) + ["tp2_2nodes", "tp2pp2"]
    for number, dist in enumerate(layouts):
        metrics[f"logprob_difference/dist={dist}"] = summarize([0.01, 0.03 + number / 100], "nat")
        metrics[f"texts_equal/dist={dist}"] = summarize([30], "texts")
        metrics[f"within/dist={dist}"] = summarize([1], "0 or 1")
    rank = RankRecord(rank=0, tp_rank=0, pp_rank=0, node_rank=0, host="h", pid=1, device=device, pool_class="P",
                      layers=(0, 1), kv_heads=1, tokens=1000, pool_bytes=1, tail_bytes=0, bytes_per_token_formula=1,
                      bytes_per_token_allocated=1, bytes_per_token_full=1)
    kv = KVRecord(
        format="K 4; V 4", enabled=True, plan_hash="0" * 12, page_size=64, tokens=1000, effective_bits=4.5,
        budget_bytes_per_rank=None, full_precision_dtype=dtype, full_precision_tokens=None, capacity_ratio=None,
        package_version="0", sglang_version="0", ranks=(rank,), unknown=dict.fromkeys(
            ("budget_bytes_per_rank", "full_precision_tokens", "capacity_ratio"), "a test"))
    return RunRecord(
        name=name, status="ok", reason=None, metrics=metrics, kv=kv, rules=("a rule",),
        config={"task": "agreement", "model": {"name": "m"}, "quant": {"name": quant}}, config_hash="0" * 10,
        overrides=(), commands=(), memory=(), warnings=(), unknown={"reason": "ok"},
        environment=Environment(
            host="h", os="Linux", python="3", git_sha="abcdef" * 7, git_dirty=dirty, lock_file="f", lock_sha256="0",
            packages={}, cpu="Test CPU", cpu_cores=1, ram_mib=1, gpus=("Test GPU 80GB",), gpu_driver="1",
            gpu_clocks="1", gpu_topology="1", cuda="13"),
        model=ModelRecord(name="m", source="path", sha256="d" * 64, architecture="Qwen2ForCausalLM", layers=1,
                          q_heads=1, kv_heads=1, head_dim=64, parameters=1, dtype=dtype),
        samples=SamplesFile(file="requests.jsonl", count=0, sha256="0"), started="2026-01-01T00:00:00+00:00",
        ended="2026-01-01T00:00:01+00:00", seed=0, tracking=Tracking(mode="disabled", status="disabled"),
    )


@pytest.fixture
def run_dir(tmp_path):
    def write(name, **changes):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        samples = folder / "requests.jsonl"
        samples.write_text('{"server": "single"}\n')
        whole = SamplesFile(file=samples.name, count=1, sha256=file_sha256(samples))
        write_record(folder, made_up(name, **changes).model_copy(update={"samples": whole}))
        return folder

    return write


@pytest.fixture
def folder(tmp_path, run_dir):
    publish([run_dir("a"), run_dir("b", quant="bf16", floor=False), run_dir("c", device="cpu")], tmp_path / "agreement")
    return tmp_path / "agreement"


def test_a_row_a_layout_with_its_floor(folder):
    with (folder / "agreement.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["device"], r["quant"], r["dist"]) for r in rows] == [
        ("Test CPU", "kv4", "tp2_2nodes"), ("Test CPU", "kv4", "tp2pp2"),
        ("Test GPU 80GB", "bf16", "tp2_2nodes"), ("Test GPU 80GB", "bf16", "tp2pp2"),
        ("Test GPU 80GB", "kv4", "tp2_2nodes"), ("Test GPU 80GB", "kv4", "tp2pp2")]
    assert rows[5] == {
        "device": "Test GPU 80GB", "model": "m", "dtype": "float32", "quant": "kv4", "dist": "tp2pp2",
        "floor_mean": "0.02", "floor_max": "0.03", "mean": "0.03", "max": "0.05", "tokens": "2", "texts_equal": "30",
        "prompts": "32", "within": "True", "commit": "abcdefabcdef", "run": "a"}
    assert rows[3]["floor_mean"] == ""


def test_table_and_checksums_come_back(folder):
    assert to_csv(table_of(published(folder))) == (folder / "agreement.csv").read_text()
    sums = dict(reversed(line.split(maxsplit=1)) for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == {"agreement.csv", "README.md", *(f"{run}/{file}" for run in "abc"
                                                       for file in ("record.json", "requests.jsonl"))}
    for name, digest in sums.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_the_same_layout_twice_is_refused_and_changes_nothing(folder, run_dir):
    before = (folder / "agreement.csv").read_bytes()
    with pytest.raises(UserError, match="two runs measured m float32 kv4"):
        publish([run_dir("twin")], folder)
    assert (folder / "agreement.csv").read_bytes() == before


def test_a_run_of_no_commit_is_refused(run_dir, tmp_path):
    with pytest.raises(UserError, match="no commit describes"):
        publish([run_dir("x", dirty=True)], tmp_path / "agreement")
    assert not (tmp_path / "agreement").exists()
