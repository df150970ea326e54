"""Lies under load: what measure/test_lies.py does to the seed's tests, to a closed and an open loop.

task=serve runs for real but for the server (lying_cluster.py) and the generator: bench_serving, whose imports take ten
seconds, is held to the same in test_bench_serving.py.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvtuner_sglang.load import measure
from kvtuner_sglang.load.bench_serving import arrivals_s
from kvtuner_sglang.load.plan import Batch
from kvtuner_sglang.serving import client
from kvtuner_sglang.serving.abort import Abort
from kvtuner_sglang.serving.client import Sample
from kvtuner_sglang.tasks import serve
from lies import another_model, another_plan, quantization_off, repeated_prompts, sixteen_bit_pool, slow_client
from lying_cluster import run_task

SHORT = ["workload.prompt_tokens=80", "workload.output_tokens=2", "workload.requests=4"]
LOADS = {"closed": ["workload=closed", "workload.concurrency=[2]", *SHORT],
         "open": ["workload=open", "workload.rates_per_s=[10]", "workload.max_dispatch_lag_ms=1000", *SHORT]}
WARM_UPS = {"closed": 2, "open": 4}
MEASURED = 3 * 4


@dataclass(frozen=True)
class InThisProcess:
    """Sends batches as bench_serving does, by the same client and the same arrivals."""

    base_url: str
    keep: Callable[[Sample], None]

    def send(self, batch: Batch) -> list[Sample]:
        samples = asyncio.run(self._open(batch)) if batch.level.rate_per_s else client.closed_loop(
            self.base_url, [turns[0] for turns in batch.conversations], batch.level.concurrency or 1, batch.timeout_s)
        for sample in samples:
            self.keep(sample)
        return samples

    async def _open(self, batch: Batch) -> list[Sample]:
        began = time.perf_counter()

        async def one(request: client.Request, offset_s: float) -> Sample:
            await asyncio.sleep(began + offset_s - time.perf_counter())
            sample = await client.send(session, self.base_url, request, batch.timeout_s, Abort())
            sample.scheduled_s = began + offset_s
            return sample

        offsets = arrivals_s(batch.level.rate_per_s, len(batch.conversations), batch.seed)
        async with client.open_session() as session:
            return await asyncio.gather(*(one(turns[0], offset_s)
                                          for turns, offset_s in zip(batch.conversations, offsets, strict=True)))


@pytest.fixture(autouse=True)
def _generator(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def in_this_process(base_url: str, *words: Any) -> Iterator[InThisProcess]:
        yield InThisProcess(base_url, words[-1])

    monkeypatch.setattr(measure, "load_generator", in_this_process)


@pytest.mark.alone
@pytest.mark.parametrize("load", LOADS)
def test_the_honest_load_counts(load: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, record = run_task(serve, tmp_path, monkeypatch, workload=LOADS[load])
    assert (record.status, record.reason, record.samples.count) == ("ok", None, WARM_UPS[load] + MEASURED)


@pytest.mark.parametrize(("load", "rule", "measured", "lie"), [
    pytest.param("closed", "same_server", MEASURED, {"server": "restarted"}, marks=pytest.mark.alone),
    pytest.param("open", "same_server", MEASURED, {"server": "restarted"}, marks=pytest.mark.alone),
    ("closed", "unique_prompts", 0, {"patch": repeated_prompts}),
    ("open", "unique_prompts", 0, {"patch": repeated_prompts}),
    ("closed", "fast_client", 4, {"patch": slow_client}),
    ("open", "on_schedule", 4, {"patch": slow_client}),
    ("open", "retractions_reported", 4, {"server": "uncounted"}),
    ("closed", "wrong_server", None, {"info": another_plan}),
    ("open", "wrong_server", None, {"info": another_model}),
    ("closed", "unquantized_pool", None, {"info": sixteen_bit_pool}),
    ("open", "unquantized_pool", None, {"info": quantization_off}),
])
def test_a_lie_leaves_its_reason_and_no_figure(load: str, rule: str, measured: int | None, lie: dict[str, Any],
                                               tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """measured: requests before the lie was seen, None of a server that was never let in."""
    if "patch" in lie:
        lie["patch"](monkeypatch)
    _, record = run_task(serve, tmp_path, monkeypatch, workload=LOADS[load], servers=(lie.get("server", "honest"),),
                         info=lie.get("info"))
    assert f"{rule}: " in (record.reason or "")
    assert (record.status, record.metrics) == ("failed" if measured is None else "invalid", {})
    assert record.samples.count == (0 if measured is None else WARM_UPS[load] + measured)
