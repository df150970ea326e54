"""The three tests against an HTTP server that lies: each lie is refused, and every sample is kept all the same."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from kvtuner_sglang.config import RunConfig, parse
from kvtuner_sglang.errors import MeasurementInvalid, RunFailed
from kvtuner_sglang.measure.hardware import Floor
from kvtuner_sglang.measure.seed_tests import run_seed_tests
from kvtuner_sglang.serving.abort import Abort
from kvtuner_sglang.serving.client import Sample, server_info

CONF = Path(__file__).parents[2] / "conf"
OVERRIDES = ["workload.ttft.prompt_tokens=[10,50]", "workload.ttft.repeats=2", "workload.throughput.requests=6",
             "workload.throughput.concurrency=[1,3]", "workload.throughput.output_tokens=4",
             "server.request_timeout_s=5"]
TOKEN_S = 0.05  # as slow as a real server, or the client's share of the time would be refused first
NO_FLOOR = Floor(None, SimpleNamespace(), 4, 0)  # test_lies.py has one
WORKER_ANSWER = (404, b'{"detail":"Not Found"}')  # what node 1 answers to every path but /health


@dataclass
class Lie:
    """How the server differs from a right one: the status of /generate, tokens from the cache, a restart."""

    status: int = 200
    cached_after: int | None = None  # requests before the prefix cache turns warm
    restarts: bool = False
    requests: int = 0
    info_asked: int = field(default=0)


class Handler(BaseHTTPRequestHandler):
    lie: Lie

    def do_GET(self) -> None:
        self.lie.info_asked += 1
        startup = 2.0 if self.lie.restarts and self.lie.info_asked > 1 else 1.0
        kvtuner = {"plan_hash": "0123", "enabled": True, "measurement": {}, "ranks": [{"host": "here", "pid": 1}]}
        self.answer(200, json.dumps({"startup_time": startup, "kvtuner": kvtuner}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        if self.path.startswith("/flush_cache"):
            self.answer(200, b"Cache flushed.")
        elif self.lie.status != 200:
            self.answer(*WORKER_ANSWER)
        else:
            self.answer(200, self.stream(body))

    def stream(self, body: dict[str, Any]) -> bytes:
        self.lie.requests += 1
        time.sleep(TOKEN_S * body["sampling_params"]["max_new_tokens"])
        warm = self.lie.cached_after is not None and self.lie.requests > self.lie.cached_after
        events = []
        for count in range(1, body["sampling_params"]["max_new_tokens"] + 1):
            meta = {"prompt_tokens": len(body["input_ids"]), "completion_tokens": count, "cached_tokens": int(warm) * 8}
            events.append({"text": "x" * count, "output_ids": [7] * count, "meta_info": meta})
        return b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in events) + b"data: [DONE]\n\n"

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        pass


@dataclass
class Target:
    """The server as a cluster whose ranks are well, unless `dead` names one."""

    base_url: str
    server_info: dict[str, Any]
    abort: Abort = field(default_factory=Abort)
    dead: str | None = None

    def check(self, wait_s: float = 0.0) -> None:
        if self.dead:
            raise RunFailed(self.dead)


@pytest.fixture
def serve() -> Iterator[Callable[[Lie], Target]]:
    servers: list[ThreadingHTTPServer] = []

    def start(lie: Lie) -> Target:
        handler = type("LyingHandler", (Handler,), {"lie": lie})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        return Target(url, server_info(url))

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def config() -> RunConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return parse(OmegaConf.to_container(compose("config", OVERRIDES), resolve=True))


def run(target: Target, config: RunConfig, samples: list[Sample]) -> None:
    run_seed_tests(target, config, SimpleNamespace(vocab_size=49152), lambda _line: None, samples.append, NO_FLOOR)


def test_the_seeds_failure_is_refused(serve: Callable[[Lie], Target], config: RunConfig) -> None:
    """The seed report timed HTTP 404 answers of node 1 and called all of them successes."""
    samples: list[Sample] = []
    with pytest.raises(MeasurementInvalid, match="http_200: HTTP status 404"):
        run(serve(Lie(status=404)), config, samples)
    assert [(s.kind, s.http_status) for s in samples] == [("ttft_warmup", 404)]


def test_a_warm_prefix_cache_is_refused(serve: Callable[[Lie], Target], config: RunConfig) -> None:
    samples: list[Sample] = []
    with pytest.raises(MeasurementInvalid, match="cold_cache: 8 prompt tokens"):
        run(serve(Lie(cached_after=3)), config, samples)
    assert [s.kind for s in samples] == ["ttft_warmup", "ttft_warmup", "ttft", "ttft"]


def test_a_failed_request_under_load_is_no_throughput(serve: Callable[[Lie], Target], config: RunConfig) -> None:
    samples: list[Sample] = []
    with pytest.raises(MeasurementInvalid, match=r"throughput_c1 request .*; 3 of 6 requests failed"):
        run(serve(Lie(cached_after=10)), config, samples)
    assert len(samples) == 6 + 1 + 6


def test_a_server_that_was_replaced_is_refused(serve: Callable[[Lie], Target], config: RunConfig) -> None:
    """Everything else about this one is right, so all requests are sent: each unique, each of its length."""
    samples: list[Sample] = []
    with pytest.raises(MeasurementInvalid, match="same_server"):
        run(serve(Lie(restarts=True)), config, samples)
    ttft = [s.prompt_tokens_sent for s in samples if s.kind == "ttft"]
    assert ttft == [10, 50, 10, 50]
    assert len({s.request_id for s in samples}) == len(samples)


def test_a_lost_rank_is_named(serve: Callable[[Lie], Target], config: RunConfig) -> None:
    target = serve(Lie())
    target.dead = "rank 3 died"
    with pytest.raises(RunFailed, match="rank 3 died"):
        run(target, config, [])


def test_too_few_requests_send_nothing(serve: Callable[[Lie], Target], config: RunConfig) -> None:
    samples: list[Sample] = []
    lie = Lie()
    few = {**config.to_dict(), "workload": {**config.to_dict()["workload"]}}
    few["workload"]["throughput"] = {**few["workload"]["throughput"], "requests": 5, "rounds": 1}
    with pytest.raises(MeasurementInvalid, match="enough_requests"):
        run(serve(lie), parse(few), samples)
    assert (samples, lie.requests) == ([], 0)
