"""From what was measured to a record, one tidy CSV and two figures that are drawn from the CSV alone."""

import csv
import json

import matplotlib as mpl
import numpy as np
import pytest

from kvtuner_sglang import figure_style
from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.record import (
    Environment,
    KVRecord,
    ModelRecord,
    RankRecord,
    RunRecord,
    SamplesFile,
    Tracking,
    write_record,
)
from kvtuner_sglang.quality import drawing, summary
from kvtuner_sglang.quality.compare import TokenRows
from kvtuner_sglang.quality.figures import RULES, describe, item_metrics, prose_metrics
from kvtuner_sglang.quality.session import records, table

REQUIRED = ["model", "quant", "key_axis", "group", "effective_bits", "kl", "kl_se", "top1_agreement", "ppl", "recall",
            "recall_se", "arithmetic", "n_tokens", "n_recall", "engine", "device", "commit"]


def token_rows(kl, count=400):
    nll = np.full(count, 3.0)
    nll[-1] = np.nan
    return TokenRows(np.full(count, kl), np.array([1.0] * (count - 4) + [0.0] * 4), nll, nll + kl)


def made_up_record(name, kl, *, quant="kv4", axis=1, status="ok"):
    """A record of this test: nothing in it was measured."""
    right_full = [True] * 90 + [False] * 10
    right = [True] * 88 + [False] * 12
    figures = {
        "metrics": prose_metrics([token_rows(kl), token_rows(3 * kl)]) | item_metrics("recall", right, right_full)
        | item_metrics("arithmetic", right[:50], right[50:]),
        "kv": KVRecord(
            format="K 4; V 4", enabled=True, plan_hash="0" * 12, page_size=64 if axis else 1, tokens=10,
            effective_bits=4.5, budget_bytes_per_rank=1, full_precision_dtype="float32", full_precision_tokens=1,
            capacity_ratio=10.0, package_version="0", sglang_version="0", ranks=(RankRecord(
                rank=0, tp_rank=0, pp_rank=0, node_rank=0, host="h", pid=1, device="cpu", pool_class="P",
                layers=(0, 1), kv_heads=1, tokens=10, pool_bytes=1, tail_bytes=0, bytes_per_token_formula=1,
                bytes_per_token_allocated=1, bytes_per_token_full=1),)),
        "rules": RULES,
    } if status == "ok" else {"metrics": {}, "kv": None, "rules": ()}
    nothing = ("gpus", "gpu_driver", "gpu_clocks", "gpu_topology", "cuda")
    unknown = {"reason": "ok"} if status == "ok" else {"kv": "failed"}
    return RunRecord(
        name=name, status=status, reason=None if status == "ok" else "the engine ended",
        config={"model": {"name": "m"}, "task": "quality",
                "quant": {"name": quant, "enabled": True, "axis_key": axis, "group_size": None}},
        config_hash="0" * 10, overrides=(), commands=(), memory=(), warnings=(), unknown=unknown,
        environment=Environment(
            host="h", os="Linux", python="3", git_sha="abcdef" * 7, git_dirty=False, lock_file="f", lock_sha256="0",
            packages={}, cpu="Test CPU", cpu_cores=1, ram_mib=1, **dict.fromkeys(nothing),
            unknown=dict.fromkeys(nothing, "no GPU")),
        model=ModelRecord(name="m", source="path", sha256="d" * 64, architecture="LlamaForCausalLM", layers=1,
                          q_heads=1, kv_heads=1, head_dim=64, parameters=1, dtype="float32"),
        samples=SamplesFile(file="requests.jsonl", count=0, sha256="0"), started="2026-01-01T00:00:00+00:00",
        ended="2026-01-01T00:00:01+00:00", seed=0, tracking=Tracking(mode="disabled", status="disabled"), **figures,
    )


@pytest.fixture
def folder(tmp_path):
    for name, kl, quant, axis in (("a", 0.005, "kv4", 1), ("b", 0.1, "kv4_token", 0)):
        run_dir = tmp_path / f"quality-{name}"
        run_dir.mkdir()
        write_record(run_dir, made_up_record(run_dir.name, kl, quant=quant, axis=axis))
    plan = [{"key": {"axis": 1, "group": 64}, "value": {}}]
    row = {"model": "m", "recipe": "k3v3", "effective_bits": 3.5, "kl": 0.03, "kl_se": 0.001, "top1_agreement": 0.9,
           "ppl": 31.0, "recall": 0.8, "recall_se": 0.02, "n_tokens": 800, "n_recall": 100, "plan": plan}
    (tmp_path / "recipes-m.json").write_text(json.dumps(
        {"engine": "transformers", "device": "cpu", "dtype": "float32", "commit": "c" * 12, "rows": [row]}))
    return tmp_path


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_row_a_run_with_the_published_columns(folder):
    rows = read(summary.write_summary(folder))
    assert list(rows[0])[: len(REQUIRED)] == REQUIRED
    by_quant = {row["quant"]: row for row in rows}
    assert set(by_quant) == {"kv4", "kv4_token", "k3v3"}
    kv4 = by_quant["kv4"]
    assert (kv4["key_axis"], kv4["group"], kv4["engine"], kv4["device"]) == ("channel", "64", "sglang", "Test CPU")
    assert float(kv4["kl"]) == pytest.approx(0.01)
    assert float(kv4["ppl"]) == pytest.approx(np.exp(3.01), rel=1e-4)
    assert (kv4["n_tokens"], kv4["n_recall"], float(kv4["recall"])) == ("800", "100", 0.88)
    assert float(kv4["recall_difference"]) == pytest.approx(-0.02)
    assert float(kv4["recall_difference_low"]) < -0.02 < float(kv4["recall_difference_high"])
    assert (by_quant["kv4_token"]["key_axis"], by_quant["kv4_token"]["group"]) == ("token", "head")
    assert by_quant["k3v3"]["engine"] == "transformers"
    assert by_quant["k3v3"]["arithmetic"] == ""


def test_figures_come_from_the_csv_and_repeat_to_the_byte(folder):
    def drawn():
        return {path.name: path.read_bytes() for name, figure in drawing.figures(folder).items()
                for path in figure_style.save(figure, folder, name)}

    summary.write_summary(folder)
    for path in folder.glob("quality-*/record.json"):
        path.unlink()
    first = drawn()
    assert set(first) == {"kl.pdf", "kl.png", "recall.pdf", "recall.png"}
    with mpl.rc_context({"font.size": 20, "savefig.dpi": 30, "axes.facecolor": "red"}):  # a user's own style
        assert drawn() == first
    csv_path = folder / summary.CSV_FILE
    csv_path.write_text(csv_path.read_text().replace("0.88", "0.42"))
    changed = drawn()
    assert changed["recall.png"] != first["recall.png"]
    assert changed["kl.png"] == first["kl.png"]


def test_a_failed_run_is_no_row(folder):
    run_dir = folder / "quality-c"
    run_dir.mkdir()
    write_record(run_dir, made_up_record("quality-c", 0.1, status="failed"))
    with pytest.raises(UserError, match="quality-c is failed"):
        summary.summarize(folder)
    assert "failed: the engine ended" in table(records(folder))


def test_an_empty_folder_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="task=quality first"):
        summary.summarize(tmp_path)


def test_the_console_says_n_and_interval(folder):
    said: list[str] = []
    describe(made_up_record("x", 0.005).metrics, said.append)
    assert "over 800 tokens" in said[0]
    assert "n = 100" in said[1]
    assert "-0.020" in said[1]
    assert "kv4_token" in table(records(folder))


def test_short_prose_has_no_error_rather_than_a_wrong_one():
    metrics = prose_metrics([token_rows(0.1, count=120)])
    assert "kl_se_nats" not in metrics
    assert metrics["kl_nats"].n == 120
