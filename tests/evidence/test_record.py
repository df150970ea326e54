"""The record refuses half a truth: figures of a run that is not ok, nulls without a reason."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import ValidationError

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.record import RunRecord, file_sha256, load_record, metric_key, write_record
from kvtuner_sglang.evidence.samples import SampleLog, read_samples


def test_round_trip(tmp_path: Path, make_record: Callable[..., RunRecord]) -> None:
    record = make_record()
    write_record(tmp_path, record)
    assert load_record(tmp_path) == record
    raw = json.loads((tmp_path / "record.json").read_text())
    assert raw["schema_version"] == 1
    assert raw["unknown"]["model"] == "not part of this test"
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize("status", ["failed", "invalid", "oom"])
@pytest.mark.parametrize("figure", ["metrics", "kv", "rules"])
def test_a_run_that_is_not_ok_carries_no_figure(make_record: Callable[..., RunRecord], status: str,
                                                figure: str) -> None:
    value = getattr(make_record(), figure)
    with pytest.raises(ValidationError, match=f"status {status} carries no"):
        make_record(status=status, **{figure: value})


def test_a_run_that_is_not_ok_needs_a_reason(make_record: Callable[..., RunRecord]) -> None:
    assert make_record(status="failed").reason == "rank 1 died"
    with pytest.raises(ValidationError, match="needs a reason"):
        make_record(status="failed", reason=None)


def test_an_ok_run_needs_figures(make_record: Callable[..., RunRecord]) -> None:
    with pytest.raises(ValidationError, match="needs metrics"):
        make_record(metrics={})


@pytest.mark.parametrize("unknown", [{}, {"kv": "x"}, {"reason": "x", "model": "x", "kv": "x"},
                                     {"reason": "ok", "model": ""}])
def test_null_needs_a_reason_and_nothing_else_has_one(make_record: Callable[..., RunRecord],
                                                      unknown: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="unknown"):
        make_record(unknown=unknown)


def test_an_interrupted_write_leaves_the_old_record(tmp_path: Path, make_record: Callable[..., RunRecord],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    write_record(tmp_path, make_record())

    def crash(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        write_record(tmp_path, make_record(status="failed"))
    assert load_record(tmp_path).status == "ok"


def test_loading_what_is_no_record_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run it first"):
        load_record(tmp_path)
    (tmp_path / "record.json").write_text('{"schema_version": 2}')
    with pytest.raises(UserError, match="force=true"):
        load_record(tmp_path)


def test_levels_and_metric(make_record: Callable[..., RunRecord]) -> None:
    record = make_record()
    assert record.levels("ttft_ms", "prompt_tokens") == [10, 1000]
    assert record.levels("output_tokens_per_s", "concurrency") == [2]
    assert record.metric("ttft_ms", prompt_tokens=10).p50 == 11.0
    assert metric_key("ttft_ms", prompt_tokens=10) == "ttft_ms/prompt_tokens=10"


@dataclass
class Line:
    number: int
    text: str


def test_samples_survive_threads_and_a_crash(tmp_path: Path) -> None:
    log = SampleLog(tmp_path)

    def crash_after_appending() -> None:
        with log, ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda number: log.append(Line(number, "é\n")), range(40)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        crash_after_appending()
    assert sorted(line["number"] for line in read_samples(tmp_path)) == list(range(40))
    summary = log.summary()
    assert (summary.count, summary.file) == (40, "requests.jsonl")
    assert summary.sha256 == file_sha256(tmp_path / "requests.jsonl")


def test_the_capacity_ratio_is_that_of_its_tokens(make_record: Callable[..., RunRecord]) -> None:
    tree = json.loads(make_record().model_dump_json())
    tree["kv"]["capacity_ratio"] *= 1.01
    with pytest.raises(ValidationError, match="not tokens / full_precision_tokens"):
        RunRecord.model_validate(tree)
