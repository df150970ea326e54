"""A server as a process of its own, started in the place of SGLang's launcher: honest, or with one lie.

    python lying_server.py HOST PORT LIE INFO.json

INFO.json is what /server_info shows; the process puts its own host and pid in.  An honest answer takes PREFILL_S and
TOKEN_S for every output token, through the stream as it comes.  LIE "node1" is no lie but what a second node does:
HTTP 404 to everything but /health.  LIE "out_of_memory" ends as torch does that has none.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PREFILL_S, TOKEN_S = 0.06, 0.03
CONSTANT_S = 0.4
Events = list[tuple[float, dict[str, Any]]]  # seconds to wait, and what to send then


def event(tokens: int, prompt_tokens: int, **meta: Any) -> dict[str, Any]:
    return {"text": "word " * tokens, "output_ids": list(range(tokens)),
            "meta_info": {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "cached_tokens": 0,
                          "num_retractions": 0, "finish_reason": None, **meta}}


def honest(prompt: int, asked: int, requests: int) -> Events:
    return [(PREFILL_S + TOKEN_S if n == 1 else TOKEN_S, event(n, prompt)) for n in range(1, asked + 1)]


def empty_text(prompt: int, asked: int, requests: int) -> Events:
    return [(wait, {**said, "text": ""}) for wait, said in honest(prompt, asked, requests)]


def fewer_tokens(prompt: int, asked: int, requests: int) -> Events:
    return honest(prompt, asked - 1, requests)


def constant_time(prompt: int, asked: int, requests: int) -> Events:
    """Half of the time for the first token, the rest shared by the others: the sum is always the same."""
    return [(CONSTANT_S / 2 if n == 1 else CONSTANT_S / 2 / (asked - 1), event(n, prompt)) for n in range(1, asked + 1)]


def jittered_time(prompt: int, asked: int, requests: int) -> Events:
    """The same, a little less or a little more: 8 %, as 50 ms would be 46 to 54."""
    jitter = 1 + 0.08 * (requests % 3 - 1)
    return [(jitter * wait, said) for wait, said in constant_time(prompt, asked, requests)]


def uncounted(prompt: int, asked: int, requests: int) -> Events:
    return [(wait, event(n, prompt, num_retractions=None)) for n, (wait, _) in enumerate(honest(prompt, asked, 0), 1)]


def cached_prefix(prompt: int, asked: int, requests: int) -> Events:
    cached = prompt // 2 if requests > 2 else 0
    return [(wait, event(n, prompt, cached_tokens=cached))
            for n, (wait, _) in enumerate(honest(prompt, asked, requests), 1)]


def at_once(prompt: int, asked: int, requests: int) -> Events:
    return [(0.0, event(n, prompt)) for n in range(1, asked + 1)]


def tokens_held_back(prompt: int, asked: int, requests: int) -> Events:
    """All of an answer's tokens in one burst at its end, which makes the time per output token look like nothing."""
    whole_s = PREFILL_S + TOKEN_S * asked
    return [(whole_s if n == 1 else 0.0, event(n, prompt)) for n in range(1, asked + 1)]


ANSWERS: dict[str, Callable[[int, int, int], Events]] = {
    "empty_text": empty_text, "fewer_tokens": fewer_tokens, "constant_time": constant_time,
    "jittered_time": jittered_time, "cached_prefix": cached_prefix, "at_once": at_once,
    "tokens_held_back": tokens_held_back, "uncounted": uncounted,
}
NOT_FOUND = '{"detail":"Not Found"}'


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    lie: str
    info: dict[str, Any]
    requests = 0
    info_asked = 0

    def do_GET(self) -> None:
        if self.lie == "node1" and self.path != "/health":
            self.plain(404, NOT_FOUND)
        elif self.path.startswith("/server_info"):
            Handler.info_asked += 1
            restarted = self.lie == "restarted" and Handler.info_asked > 1
            self.plain(200, json.dumps({**self.info, "startup_time": 2.0 if restarted else 1.0}))
        else:
            self.plain(200, "")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        if self.lie == "node1" or (self.lie == "json_404" and self.path == "/generate"):
            self.plain(404, NOT_FOUND)
        elif self.path == "/generate":
            Handler.requests += 1
            answer = ANSWERS.get(self.lie, honest)
            asked = body["sampling_params"]["max_new_tokens"]
            self.stream(answer(len(body.get("input_ids", ())), asked, Handler.requests))
        else:
            self.plain(200, "Cache flushed.")

    def plain(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def stream(self, events: Events) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for wait, said in events:
            time.sleep(wait)
            self.piece(f"data: {json.dumps(said)}\n\n")
        self.piece("data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def piece(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def log_message(self, *_args: object) -> None:
        pass


def main(host: str, port: str, lie: str, info: str) -> None:
    if lie == "out_of_memory":
        sys.exit("torch.OutOfMemoryError: CUDA out of memory.\nRuntimeError: a rank is gone")
    Handler.lie, Handler.info = lie, json.loads(Path(info).read_text())
    for rank in Handler.info.get("kvtuner", {}).get("ranks", ()):
        rank["host"], rank["pid"] = socket.gethostname(), os.getpid()
    server = ThreadingHTTPServer((host, int(port)), Handler)
    server.daemon_threads = True
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
