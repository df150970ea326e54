"""SGLang's own bench_serving (sglang.benchmark.serving, 0.5.17) as a library, in a process of its own.

    python -m kvtuner_sglang.load.bench_serving FD URL MODEL_PATH SUMMARY_FILE

From it come the arrivals (Poisson, or a bound on what is in flight), the turns of conversations, and a line per batch
in SUMMARY_FILE.  Requests are sent by our own client, entered in its table of backends: its own function counts an
empty or broken HTTP 200 stream as a success with all its tokens and times the first text, not the first token.
Batches come over the connection FD, samples go back over it as they end, and None after a batch's last.
"""

import argparse
import asyncio
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from kvtuner_sglang.load.plan import Batch
from kvtuner_sglang.serving import client
from kvtuner_sglang.serving.abort import Abort
from kvtuner_sglang.serving.client import Request, Sample

BACKEND = "sglang-kvtuner"
Keep = Callable[[Sample], None]


def arrivals_s(rate_per_s: float | None, count: int, seed: int) -> list[float]:
    """Seconds after the first request at which bench_serving plans to send each, once numpy's generator has `seed`."""
    if rate_per_s is None:
        return [0.0] * count
    gaps = np.random.RandomState(seed).exponential(1.0 / rate_per_s, count - 1)
    return [0.0, *np.cumsum(gaps).tolist()]


def require_drawn(rate_per_s: float, count: int, seed: int) -> None:
    """Raise RuntimeError unless numpy's generator stands where `count` gaps, and nothing else, leave it."""
    planned = np.random.RandomState(seed)
    planned.exponential(1.0 / rate_per_s, count)
    if np.random.random_sample() != planned.random_sample():  # noqa: NPY002 - the generator that bench_serving uses
        raise RuntimeError("bench_serving drew its arrivals otherwise than arrivals_s() says")


class Sender:
    """The request function of one batch: plays each conversation's turns and keeps every sample."""

    def __init__(self, batch: Batch, base_url: str, session: Any, keep: Keep, output_class: Any) -> None:
        self.batch, self.base_url, self.session, self.keep, self.output_class = (
            batch, base_url, session, keep, output_class)
        self.planned = {turn.request_id: turn for turns in batch.conversations for turn in turns}
        self.said: dict[str, list[int]] = {}
        offsets = arrivals_s(batch.level.rate_per_s, len(batch.conversations), batch.seed)
        self.offset_s = dict(zip((turns[0].request_id for turns in batch.conversations), offsets, strict=True))
        self.first_s: float | None = None

    async def __call__(self, request_func_input: Any, pbar: Any = None) -> Any:
        """One turn, whose id is the last message's content; its conversation's id is the routing key."""
        conversation = request_func_input.routing_key
        turn = self.planned[request_func_input.prompt[-1]["content"]]
        request = replace(turn, input_ids=[*self.said.get(conversation, ()), *turn.input_ids])
        if self.first_s is None:
            self.first_s = time.perf_counter()
        sample = await client.send(self.session, self.base_url, request, self.batch.timeout_s, Abort())
        if self.batch.level.rate_per_s is not None and turn.request_id in self.offset_s:
            sample.scheduled_s = self.first_s + self.offset_s[turn.request_id]
        self.said[conversation] = [*request.input_ids, *sample.output_ids]
        self.keep(sample)
        return self._output(request, sample)

    def _output(self, request: Request, sample: Sample) -> Any:
        """The sample in bench_serving's own terms, for its summary."""
        times = sample.token_times_s
        return self.output_class(
            generated_text=sample.text, success=sample.error is None, error=sample.error or "",
            latency=(times[-1] - sample.sent_s) if times else 0.0, ttft=(times[0] - sample.sent_s) if times else 0.0,
            itl=np.diff(times).tolist(), prompt_len=len(request.input_ids), output_len=sample.stream_tokens,
            start_time=sample.sent_s, cached_tokens=sample.cached_tokens or 0,
        )


async def run_batch(serving: Any, batch: Batch, base_url: str, model: str, tokenizer: Any,
                    keep: Keep) -> dict[str, Any]:
    """Send the batch; returns bench_serving's own summary of it."""
    async with client.open_session() as session:
        send: Callable[..., Awaitable[Any]] = Sender(batch, base_url, session, keep, serving.RequestFuncOutput)
        serving.ASYNC_REQUEST_FUNCS[BACKEND] = send
        rows = [serving.DatasetRow(prompt=[turn.request_id for turn in turns], prompt_len=len(turns[0].input_ids),
                                   output_len=turns[0].output_tokens, routing_key=turns[0].request_id)
                for turns in batch.conversations]
        np.random.seed(batch.seed)  # noqa: NPY002 - bench_serving draws its arrivals from this one
        rate = batch.level.rate_per_s
        summary = await serving.benchmark(
            backend=BACKEND, api_url=f"{base_url}/generate", base_url=base_url, model_id=model, tokenizer=tokenizer,
            input_requests=rows, request_rate=float("inf") if rate is None else rate,
            max_concurrency=batch.level.concurrency, disable_tqdm=True, lora_names=None,
            lora_request_distribution=None, lora_zipf_alpha=None, extra_request_body={}, profile=False,
            warmup_requests=0,  # its warm-up sends the first measured prompt; ours has prompts of its own
        )
    if rate is not None:
        require_drawn(rate, len(rows), batch.seed)
    return summary


def settings(summary_file: str) -> argparse.Namespace:
    """What benchmark() reads from its module's command line."""
    return argparse.Namespace(
        backend=BACKEND, dataset_name="kvtuner", tag=None, output_file=summary_file, output_details=False,
        cache_report=True, plot_throughput=False, warmup_requests=0, sharegpt_output_len=None, random_input_len=None,
        random_output_len=None, random_range_ratio=None,
    )


def answer(serving: Any, batch: Batch, base_url: str, model: str, tokenizer: Any, connection: Connection) -> None:
    """Send the batch's requests, and each sample over the connection as it ends."""
    errors: list[str | None] = []

    def keep(sample: Sample) -> None:
        connection.send(sample)
        errors.append(sample.error)

    try:
        asyncio.run(run_batch(serving, batch, base_url, model, tokenizer, keep))
    except (IndexError, ValueError):
        if None in errors or len(errors) < batch.requests:
            raise
        traceback.print_exc()  # it cannot summarize a batch without a success; the samples say what happened


def serve(connection: Connection, base_url: str, model: str, summary_file: str) -> None:
    """Answer batches until the other end closes."""
    from sglang.benchmark import serving  # slow, so only where it is needed

    serving.set_ulimit()  # a connection for every request in flight
    serving.set_global_args(settings(summary_file))
    serving.MULTI_TURN_BACKENDS.add(BACKEND)
    tokenizer = serving.get_tokenizer(model)
    connection.send(None)  # ready
    while True:
        try:
            batch = connection.recv()
        except EOFError:
            return
        answer(serving, batch, base_url, model, tokenizer, connection)
        connection.send(None)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), *sys.argv[2:5])
