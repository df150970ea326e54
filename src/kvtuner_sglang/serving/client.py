"""The HTTP client of all measurements: believes a status, a stream and a token count, never a body alone.

Nothing a server does wrong is raised here; it ends as a Sample with `error` set, which no metric may count.
"""

import asyncio
import contextlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from kvtuner_sglang.errors import RunFailed
from kvtuner_sglang.serving.abort import Abort

ABORT_POLL_S = 0.05
LINE_BYTES = 4 << 20  # one event holds the whole text and all token ids so far
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy must not stand in between


@dataclass(frozen=True)
class Request:
    """One prompt. `input_ids`: its tokens; exactly `output_tokens` are asked for, greedily, whatever they are.

    cached_tokens_planned: how many prompt tokens the test put into the prefix cache.
    """

    request_id: str
    kind: str
    input_ids: Sequence[int]
    output_tokens: int
    cached_tokens_planned: int = 0

    def body(self) -> dict[str, Any]:
        return {
            "input_ids": list(self.input_ids), "stream": True, "rid": self.request_id,
            "sampling_params": {"temperature": 0.0, "max_new_tokens": self.output_tokens, "ignore_eos": True,
                                "skip_special_tokens": False},  # else special tokens alone read as an empty text
        }


@dataclass
class Sample:
    """What came back for one request. Times are `time.perf_counter()` seconds; `started_unix` is the wall clock.

    prompt_tokens, output_tokens, cached_tokens: the server's own counts in meta_info, None if it gave none; so are
    retractions: how often the request was put back into the queue for lack of memory.  scheduled_s: when an open loop
    planned to send it.
    token_times_s: when each output token arrived, counted from the stream's token ids.  `error` None is success.
    """

    request_id: str
    kind: str
    prompt_tokens_sent: int
    output_tokens_asked: int
    started_unix: float
    sent_s: float
    ended_s: float | None = None
    http_status: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    text: str = ""
    output_ids: list[int] = field(default_factory=list)
    token_times_s: tuple[float, ...] = ()
    finish_reason: str | None = None
    error: str | None = None
    cached_tokens_planned: int = 0
    retractions: int | None = None
    scheduled_s: float | None = None

    @property
    def first_token_s(self) -> float | None:
        return self.token_times_s[0] if self.token_times_s else None

    @property
    def stream_tokens(self) -> int:
        """Output tokens as the stream delivered them."""
        return len(self.token_times_s)


def stream_generate(base_url: str, input_ids: Sequence[int], output_tokens: int, timeout_s: float, *,
                    request_id: str, kind: str = "single", abort: Abort | None = None) -> Sample:
    """One request on a connection of its own; never raises for what the server does."""
    return closed_loop(base_url, [Request(request_id, kind, input_ids, output_tokens)], 1, timeout_s, abort)[0]


def closed_loop(base_url: str, requests: Sequence[Request], concurrency: int, timeout_s: float,
                abort: Abort | None = None) -> list[Sample]:
    """Keep `concurrency` requests in flight until all were sent; samples in the order of `requests`.

    `timeout_s` bounds each request from sending to its last token. When `abort` is set, those in flight end within
    a tenth of a second and the rest are not sent; their samples say so.
    """
    return asyncio.run(_closed_loop(base_url, requests, concurrency, timeout_s, abort or Abort()))


async def _closed_loop(base_url: str, requests: Sequence[Request], concurrency: int, timeout_s: float,
                       abort: Abort) -> list[Sample]:
    samples: list[Sample | None] = [None] * len(requests)
    waiting = iter(enumerate(requests))
    async with open_session() as session:
        workers = [asyncio.create_task(_worker(session, base_url, waiting, samples, timeout_s, abort))
                   for _ in range(concurrency)]
        await asyncio.gather(*workers)
    return [s if s is not None else _unsent(r, abort) for s, r in zip(samples, requests, strict=True)]


async def _worker(session: aiohttp.ClientSession, base_url: str, waiting: Iterator[tuple[int, Request]],
                  samples: list[Sample | None], timeout_s: float, abort: Abort) -> None:
    for index, request in waiting:
        if abort.is_set():
            return
        samples[index] = await send(session, base_url, request, timeout_s, abort)


def open_session() -> aiohttp.ClientSession:
    """Connections to one server, as many as there are requests in flight; to be opened and closed in an event loop."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), read_bufsize=LINE_BYTES)


async def send(session: aiohttp.ClientSession, base_url: str, request: Request, timeout_s: float,
               abort: Abort) -> Sample:
    """The request, ended by its own end, by `timeout_s` or by `abort`, whichever comes first."""
    sample = _started(request)
    answer = asyncio.create_task(_answer(session, base_url, request, sample))
    deadline = time.monotonic() + timeout_s
    while not answer.done():
        await asyncio.wait({answer}, timeout=ABORT_POLL_S)
        if answer.done():
            break
        if abort.is_set():
            sample.error = f"given up: {abort.reason}"
        elif time.monotonic() > deadline:
            sample.error = f"no complete answer within {timeout_s:g} s"
        if sample.error:
            answer.cancel()
            break
    with contextlib.suppress(asyncio.CancelledError):
        await answer
    sample.ended_s = time.perf_counter()
    return sample


async def _answer(session: aiohttp.ClientSession, base_url: str, request: Request, sample: Sample) -> None:
    finished = False
    try:
        # No timeout of aiohttp's own: its default would end a long answer; send() sets the bound.
        async with session.post(f"{base_url}/generate", json=request.body(),
                                timeout=aiohttp.ClientTimeout(total=None)) as response:
            sample.http_status = response.status
            if response.status != 200:
                sample.error = f"HTTP {response.status}: {(await response.text())[:200]}"
                return
            async for event in _events(response):
                _take(sample, event)
                finished = event is None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        sample.error = sample.error or f"{type(error).__name__}: {error}"
        return
    sample.error = sample.error or _what_is_wrong(sample, finished)


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any] | None]:
    """The server-sent events as JSON; None stands for the [DONE] that ends a whole stream."""
    async for line in response.content:
        if line.startswith(b"data:"):
            payload = line.removeprefix(b"data:").strip()
            yield None if payload == b"[DONE]" else json.loads(payload)


def _take(sample: Sample, event: dict[str, Any] | None) -> None:
    now = time.perf_counter()
    if event is None:
        return
    if "error" in event:
        sample.error = f"the stream says: {event['error']}"[:300]
        return
    ids = event.get("output_ids") or []
    new = len(ids) - len(sample.token_times_s)
    sample.token_times_s += (now,) * max(new, 0)
    sample.output_ids, sample.text = ids, event.get("text") or ""
    meta = event.get("meta_info") or {}
    sample.prompt_tokens, sample.output_tokens = meta.get("prompt_tokens"), meta.get("completion_tokens")
    sample.cached_tokens, sample.retractions = meta.get("cached_tokens"), meta.get("num_retractions")
    reason = meta.get("finish_reason")
    sample.finish_reason = reason.get("type") if isinstance(reason, dict) else reason


def _what_is_wrong(sample: Sample, finished: bool) -> str | None:
    """Why a stream that ended with HTTP 200 is no success, or None."""
    asked = sample.output_tokens_asked
    if not finished:
        return f"the stream ended without its end mark after {sample.stream_tokens} tokens"
    if sample.finish_reason == "abort":
        return "the server aborted the request"
    if sample.output_tokens != asked or sample.stream_tokens != asked:
        return (f"{asked} output tokens were asked for, the server counts {sample.output_tokens} and the stream held "
                f"{sample.stream_tokens}")
    if not sample.text:
        return "the text is empty"
    if sample.prompt_tokens != sample.prompt_tokens_sent:
        return f"{sample.prompt_tokens_sent} prompt tokens were sent but the server counts {sample.prompt_tokens}"
    return None


def _started(request: Request) -> Sample:
    return Sample(request.request_id, request.kind, len(request.input_ids), request.output_tokens,
                  started_unix=time.time(), sent_s=time.perf_counter(),
                  cached_tokens_planned=request.cached_tokens_planned)


def _unsent(request: Request, abort: Abort) -> Sample:
    sample = _started(request)
    sample.ended_s, sample.error = sample.sent_s, f"not sent: {abort.reason}"
    return sample


def get_json(url: str, timeout_s: float) -> dict[str, Any]:
    """The JSON object at `url`; raises RunFailed if there is none within `timeout_s`."""
    try:
        with _direct.open(url, timeout=timeout_s) as response:
            value = json.load(response)
    except (OSError, ValueError) as error:
        raise RunFailed(f"{url} gave no answer that can be used ({error}).") from error
    if not isinstance(value, dict):
        raise RunFailed(f"{url} answered with something that is not a JSON object.")
    return value


def server_info(base_url: str, timeout_s: float = 30.0) -> dict[str, Any]:
    """/server_info of node 0; raises RunFailed."""
    return get_json(f"{base_url}/server_info", timeout_s)


def flush_cache(base_url: str, timeout_s: float = 30.0) -> None:
    """Empty the prefix cache; raises RunFailed if the server did not."""
    # The server itself waits for requests that just ended; it refuses while one runs.
    request = urllib.request.Request(f"{base_url}/flush_cache?timeout={timeout_s / 2}", method="POST")
    try:
        with _direct.open(request, timeout=timeout_s):
            return
    except OSError as error:
        raise RunFailed(f"the prefix cache could not be flushed ({error}): end other clients first.") from error


def answers_health(base_url: str, timeout_s: float, path: str = "/health") -> bool:
    """Whether `path` answers 200 within `timeout_s`."""
    try:
        with _direct.open(f"{base_url}{path}", timeout=timeout_s) as response:
            return response.status == 200
    except OSError:
        return False
