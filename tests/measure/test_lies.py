"""A table of lies: each ends the run with a reason of its own, its samples kept and no figure; the honest run counts.

task=serve runs for real but for the server; see lying_cluster.py.
"""

import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.published import publishable
from kvtuner_sglang.evidence.samples import read_samples
from kvtuner_sglang.serving import client
from kvtuner_sglang.tasks import serve
from lies import (
    another_model,
    another_plan,
    plain_sglang,
    quantization_off,
    repeated_prompts,
    sixteen_bit_pool,
    slow_client,
)
from lying_cluster import committed, run_task


def clock_backwards(patch: pytest.MonkeyPatch) -> None:
    """Every reading of the client's clock is before the one before it."""
    began, tick = time.perf_counter(), itertools.count()

    class Clock:
        monotonic, time = staticmethod(time.monotonic), staticmethod(time.time)

        @staticmethod
        def perf_counter() -> float:
            return began - 0.001 * next(tick)

    patch.setattr(client, "time", Clock)


def wall_clock_backwards(patch: pytest.MonkeyPatch) -> None:
    """What the user's clock says, which someone may set, has no part in any duration."""
    began, tick = time.time(), itertools.count()

    class Clock:
        monotonic, perf_counter = staticmethod(time.monotonic), staticmethod(time.perf_counter)

        @staticmethod
        def time() -> float:
            return began - 60.0 * next(tick)

    patch.setattr(client, "time", Clock)


@dataclass(frozen=True)
class Lie:
    """rule: that names it; status; server: lying_server's; info, patch: how /server_info or our own client differs;
    samples: how many were taken before it was seen."""

    rule: str
    samples: int
    status: str = "invalid"
    server: str = "honest"
    info: Callable[[dict[str, Any]], None] | None = None
    patch: Callable[[pytest.MonkeyPatch], None] | None = None


# A run that gets so far is invalid, too, if other work keeps its client from sending: nothing may run beside it.
ALL = 2 + 2 + (1 + 3) + (2 + 4)  # for the time to first token, then under load; warm-ups first
TTFT = 2 + 2
LIES = {
    "404 as JSON": Lie("http_200", 1, server="json_404"),
    "200 with empty text": Lie("text_not_empty", 1, server="empty_text"),
    "fewer tokens than asked": Lie("output_tokens_by_meta", 1, server="fewer_tokens"),
    "constant-time answers": Lie("constant_time", ALL, server="constant_time"),
    "constant-time answers: jittered": Lie("constant_time", ALL, server="jittered_time"),
    "cached prefix in a cold test": Lie("cold_cache", 3, server="cached_prefix"),
    "repeated prompts": Lie("unique_prompts", 0, patch=repeated_prompts),
    "faster than the floor": Lie("faster_than_floor", TTFT, server="at_once"),
    "wrong server: another plan": Lie("wrong_server", 0, status="failed", info=another_plan),
    "wrong server: another model": Lie("wrong_server", 0, status="failed", info=another_model),
    "server restarted in between": Lie("same_server", ALL, server="restarted"),
    "client too slow": Lie("fast_client", TTFT + 1 + 3, patch=slow_client),
    "clock going backwards": Lie("times_in_order", 1, patch=clock_backwards),
    "unquantized pool: SGLang's own": Lie("unquantized_pool", 0, status="failed", info=sixteen_bit_pool),
    "unquantized pool: switched off": Lie("unquantized_pool", 0, status="failed", info=quantization_off),
    "unquantized pool: no plugin": Lie("unquantized_pool", 0, status="failed", info=plain_sglang),
    "tokens held back": Lie("faster_than_floor", ALL, server="tokens_held_back"),
}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.alone] if lie.samples == ALL else []) for name, lie in LIES.items()])
def test_a_lie_leaves_its_samples_its_reason_and_no_figure(name: str, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    lie = LIES[name]
    if lie.patch:
        lie.patch(monkeypatch)
    run_dir, record = run_task(serve, tmp_path, monkeypatch, servers=(lie.server,), info=lie.info)
    assert record.reason is not None
    assert f"{lie.rule}: " in record.reason
    assert not any(f"{other.rule}: " in record.reason for other in LIES.values() if other.rule != lie.rule)
    assert (record.status, record.metrics, record.kv, record.memory, record.rules) == (lie.status, {}, None, (), ())
    samples = read_samples(run_dir)
    assert len(samples) == record.samples.count == lie.samples
    assert all(sample["sent_s"] is not None for sample in samples)
    with pytest.raises(UserError, match=rf"is {lie.status} \(.*{lie.rule}: .* no figures to publish"):
        publishable(committed(run_dir), "serve")
    report = (run_dir / "report.md").read_text()
    assert lie.rule in report
    assert "TTFT" not in report


@pytest.mark.alone
@pytest.mark.parametrize("patch", [None, wall_clock_backwards], ids=["as it is", "while the wall clock runs backwards"])
def test_the_honest_run_counts(patch: Callable[[pytest.MonkeyPatch], None] | None, tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    if patch:
        patch(monkeypatch)
    run_dir, record = run_task(serve, tmp_path, monkeypatch)
    assert (record.status, record.reason, record.samples.count) == ("ok", None, ALL)
    for tokens in (10, 1000):
        ttft, floor = (record.metric(key, prompt_tokens=tokens) for key in ("ttft_ms", "ttft_floor_ms"))
        assert 14 < floor.p50 < 90 <= ttft.min  # the server waits 90 ms before a first token
    named = {rule.partition(":")[0] for rule in record.rules}
    assert {lie.rule for lie in LIES.values()} <= named
    assert publishable(committed(run_dir), "serve").status == "ok"


@pytest.mark.parametrize(("percent", "said"), [(51.0, True), (50.0, False)])
def test_a_machine_that_was_busy_is_a_warning_of_the_report(percent: float, said: bool, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    cores = max(os.sched_getaffinity(0)) + 1
    monkeypatch.setattr(psutil, "cpu_percent", lambda _seconds, percpu: cores * [percent])
    run_dir, record = run_task(serve, tmp_path, monkeypatch)
    assert record.environment.cpu_busy_percent == percent
    assert ("- Just before the start other work kept 51% of" in (run_dir / "report.md").read_text()) is said


def test_a_node_without_memory_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, record = run_task(serve, tmp_path, monkeypatch, servers=("out_of_memory",))
    assert (record.status, record.metrics) == ("oom", {})
    assert "(torch.OutOfMemoryError: CUDA out of memory.)" in (record.reason or "")


def test_the_twelve_lies_have_twelve_reasons() -> None:
    kinds = {name.partition(":")[0] for name in LIES}
    assert len({lie.rule for lie in LIES.values()}) == 12
    assert len(kinds - {"tokens held back"}) == 12
