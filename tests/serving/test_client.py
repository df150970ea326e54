"""The client against a real HTTP server that lies in every way a server was seen or feared to lie."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kvtuner_sglang.errors import RunFailed
from kvtuner_sglang.serving.abort import Abort
from kvtuner_sglang.serving.client import Request, Sample, closed_loop, flush_cache, server_info, stream_generate

PROMPT = [11, 12, 13]
TOKENS = 4


class Handler(BaseHTTPRequestHandler):
    """Answers /<case>/generate by CASES[case](self, request body)."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        CASES[self.path.split("/")[1]](self, body)

    def log_message(self, *_args: object) -> None:
        pass

    def plain(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def begin(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def piece(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def event(self, ids: int, text: str = "word ", counted: int | None = None, prompt: int = len(PROMPT),
              reason: str | None = None) -> None:
        meta = {"prompt_tokens": prompt, "completion_tokens": ids if counted is None else counted, "cached_tokens": 0,
                "finish_reason": {"type": reason} if reason else None}
        value = {"text": text * ids, "output_ids": list(range(ids)), "meta_info": meta}
        self.piece(f"data: {json.dumps(value)}\n\n")

    def end(self) -> None:
        self.piece("data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")


def honest(handler: Handler, body: dict) -> None:
    asked = body["sampling_params"]["max_new_tokens"]
    handler.begin()
    for ids in range(1, asked):
        handler.event(ids)
        time.sleep(0.02)
    handler.event(asked, reason="length")
    handler.end()


def streamed(*events: dict, end: bool = True) -> Callable[[Handler, dict], None]:
    def answer(handler: Handler, _body: dict) -> None:
        handler.begin()
        for event in events:
            handler.event(**event)
        if end:
            handler.end()
        else:
            handler.wfile.write(b"0\r\n\r\n")  # the stream closes as if it were whole
        handler.close_connection = True
    return answer


def cut(handler: Handler, _body: dict) -> None:
    handler.begin()
    handler.event(1)
    handler.close_connection = True  # no last chunk: what a killed server leaves


def hang(handler: Handler, _body: dict) -> None:
    handler.begin()
    handler.event(1)
    RELEASE.wait(20)


def raw(text: str) -> Callable[[Handler, dict], None]:
    def answer(handler: Handler, _body: dict) -> None:
        handler.begin()
        handler.piece(text)
        handler.end()
    return answer


RELEASE = threading.Event()
CASES: dict[str, Callable[[Handler, dict], None]] = {
    "honest": honest,
    # what a worker node answers to everything, and what the seed's script took for a success
    "worker_node": lambda h, _: h.plain(404, '{"detail":"Not Found"}'),
    "server_error": lambda h, _: h.plain(500, '{"text": "all is well", "meta_info": {"completion_tokens": 4}}'),
    "json_not_stream": lambda h, _: h.plain(200, '{"text": "fine", "output_ids": [1, 2, 3, 4]}'),
    "empty_text": streamed({"ids": TOKENS, "text": "", "reason": "length"}),
    "fewer_tokens": streamed({"ids": TOKENS - 1, "reason": "stop"}),
    "fewer_in_stream": streamed({"ids": TOKENS - 1, "counted": TOKENS, "reason": "length"}),
    "fewer_in_meta": streamed({"ids": TOKENS, "counted": TOKENS - 1, "reason": "length"}),
    "other_prompt": streamed({"ids": TOKENS, "prompt": len(PROMPT) + 1, "reason": "length"}),
    "aborted": streamed({"ids": TOKENS, "reason": "abort"}),
    "no_end_mark": streamed({"ids": TOKENS, "reason": "length"}, end=False),
    "nothing": streamed(),
    "cut": cut,
    "not_json": raw("data: {oops\n\n"),
    "error_event": raw('data: {"error": {"message": "out of memory"}}\n\n'),
    "hang": hang,
}
LIES = {
    "worker_node": "HTTP 404", "server_error": "HTTP 500", "json_not_stream": "end mark", "empty_text": "text is empty",
    "fewer_tokens": "the server counts 3 and the stream held 3",
    "fewer_in_stream": "the server counts 4 and the stream held 3",
    "fewer_in_meta": "the server counts 3 and the stream held 4",
    "other_prompt": "3 prompt tokens were sent", "aborted": "aborted", "no_end_mark": "end mark",
    "nothing": "the server counts None", "cut": "Error", "not_json": "JSONDecodeError", "error_event": "out of memory",
}


class LyingServer(ThreadingHTTPServer):
    def handle_error(self, *_args: object) -> None:
        """A client that gives up closes its connection: nothing to print."""


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    server = LyingServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    RELEASE.set()
    server.shutdown()
    thread.join()
    server.server_close()


def one(base_url: str, case: str, **options: object) -> Sample:
    timeout_s = options.pop("timeout_s", 5.0)
    return stream_generate(f"{base_url}/{case}", PROMPT, TOKENS, timeout_s, request_id=case, **options)


def test_an_honest_answer_is_counted_and_timed(base_url: str) -> None:
    sample = one(base_url, "honest", kind="ttft")
    assert sample.error is None
    assert (sample.kind, sample.http_status, sample.finish_reason) == ("ttft", 200, "length")
    assert (sample.prompt_tokens, sample.output_tokens, sample.stream_tokens, sample.cached_tokens) == (3, 4, 4, 0)
    assert sample.output_ids == [0, 1, 2, 3]
    assert sample.text == "word word word word "
    times = [sample.sent_s, *sample.token_times_s, sample.ended_s]
    assert times == sorted(times)
    # the server waits 20 ms before each of the last three tokens
    assert sample.token_times_s[3] - sample.token_times_s[0] > 0.05
    assert sample.first_token_s == sample.token_times_s[0]


@pytest.mark.parametrize("case", LIES)
def test_a_lie_is_never_a_success(base_url: str, case: str) -> None:
    sample = one(base_url, case)
    assert sample.error is not None
    assert LIES[case] in sample.error
    assert sample.ended_s is not None


def test_every_lie_is_tried() -> None:
    assert set(CASES) - {"honest", "hang"} == set(LIES)


def test_nobody_listens() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # bound but not listening: refused
        sample = stream_generate(f"http://127.0.0.1:{bound.getsockname()[1]}", PROMPT, TOKENS, 5.0, request_id="r")
    assert sample.http_status is None
    assert "Connect" in (sample.error or "")


def test_a_hanging_stream_ends_at_its_bound(base_url: str) -> None:
    started = time.monotonic()
    sample = one(base_url, "hang", timeout_s=0.5)
    assert 0.4 < time.monotonic() - started < 15  # the server hangs for 20 s
    assert "no complete answer within 0.5 s" in (sample.error or "")
    assert sample.stream_tokens == 1


def test_abort_ends_requests_in_flight_and_sends_no_more(base_url: str) -> None:
    abort = Abort()
    timer = threading.Timer(0.5, abort.set, ["rank 3 died"])
    timer.start()
    started = time.monotonic()
    requests = [Request(f"r{i}", "throughput", PROMPT, TOKENS) for i in range(5)]
    samples = closed_loop(f"{base_url}/hang", requests, 2, 60.0, abort)
    assert time.monotonic() - started < 15  # the server hangs for 20 s
    assert [s.error for s in samples] == ["given up: rank 3 died"] * 2 + ["not sent: rank 3 died"] * 3


@pytest.mark.alone
def test_closed_loop_keeps_the_order_and_the_concurrency(base_url: str) -> None:
    requests = [Request(f"r{i}", "throughput", PROMPT, TOKENS) for i in range(6)]
    samples = closed_loop(f"{base_url}/honest", requests, 3, 10.0)
    assert [s.request_id for s in samples] == [r.request_id for r in requests]
    assert [s.error for s in samples] == [None] * 6
    in_flight = [sum(a.sent_s <= b.sent_s < a.ended_s for a in samples) for b in samples]
    assert max(in_flight) == 3


def test_plain_questions_fail_with_a_sentence(base_url: str) -> None:
    with pytest.raises(RunFailed, match="server_info"):
        server_info(base_url)
    with pytest.raises(RunFailed, match="could not be flushed"):
        flush_cache("http://127.0.0.1:9")
