"""One real sglang.Engine in a process of its own:  python -m kvtuner_sglang.speed.engine_run SPEC.json RESULT.json

Lines of progress go to stdout, everything SGLang says to stderr, every call to the spec's calls file as it ends.
"""

import re
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvtuner_sglang.errors import MeasurementInvalid, UserError
from kvtuner_sglang.measure.prompts import PromptSource
from kvtuner_sglang.speed.calls import Call, Cell, Kind, SpeedResult, SpeedSpec, append_call
from kvtuner_sglang.speed.room import Room
from kvtuner_sglang.speed.validity import require_call

DECODE_LINE = re.compile(r"Decode batch.*?#running-req: (\d+).*?(?:graph: (True|False)|$)", re.MULTILINE)
Prompts = list[list[int]]


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class Session:
    """One engine, its calls and what its prefix cache holds."""

    def __init__(self, engine: Any, spec: SpeedSpec, tokens: int) -> None:
        self.engine = engine
        self.spec = spec
        self.source = PromptSource(spec.vocabulary, spec.seed)
        self.room = Room(tokens, spec.page_size, spec.outputs_per_request)
        self.prompts: Prompts = []  # those of the room's context

    def call(self, kind: Kind, number: int, cell: Cell, prompts: Prompts, new_tokens: int) -> Call:
        """Send `prompts` at once and wait for all answers; raises MeasurementInvalid if the call does not count."""
        log = Path(self.spec.log_path)
        begin_of_log = log.stat().st_size if log.is_file() else 0
        sampling = {"max_new_tokens": new_tokens, "temperature": 0.0, "ignore_eos": True}
        begin = time.perf_counter()
        answers = self.engine.generate(input_ids=prompts, sampling_params=sampling)
        seconds = time.perf_counter() - begin
        running, graph = decode_steps(log, begin_of_log) if new_tokens > 1 else (None, None)
        meta = [answer["meta_info"] for answer in answers]
        prompt, cached = [m["prompt_tokens"] for m in meta], [m["cached_tokens"] for m in meta]
        output = [m["completion_tokens"] for m in meta]
        call = Call(
            kind=kind, workload=cell.workload, round=number, batch=len(prompts), context=len(prompts[0]),
            cached=cell.cached, new_tokens=new_tokens, seconds=seconds, prompt_min=min(prompt), prompt_max=max(prompt),
            cached_min=min(cached), cached_max=max(cached), output_min=min(output), output_max=max(output),
            retractions=sum(m["num_retractions"] for m in meta), running=running, graph=graph,
        )
        append_call(Path(self.spec.calls_path), call)
        require_call(call, self.spec)
        return call

    def flush(self) -> None:
        """Empty the prefix cache; raises MeasurementInvalid if the engine does not."""
        for _ in range(50):
            if self.engine.flush_cache().success:
                return
            time.sleep(0.1)  # the last request has answered a moment before the scheduler lets it go
        raise MeasurementInvalid("the engine did not empty its prefix cache.")


def decode_steps(log: Path, begin: int) -> tuple[int, bool]:
    """Most requests of a logged decode step since byte `begin` of the log, and whether all of them were graphs."""
    with log.open("rb") as file:
        file.seek(begin)
        found = DECODE_LINE.findall(file.read().decode(errors="replace"))
    running = max((int(requests) for requests, _ in found), default=0)
    return running, bool(found) and all(graph == "True" for _, graph in found)


def measure_decode(session: Session, cell: Cell) -> str | None:
    """Fill the cache, then both lengths of answer in turn over the same prompts; why not, if they do not fit."""
    spec, room = session.spec, session.room
    most = room.most(cell.context)
    batch = most if cell.batch is None else cell.batch
    if not 0 < batch <= most:
        return f"{batch or 1} x {cell.context} tokens do not fit: the pool holds {most} such requests."
    if batch > spec.engine["max_running_requests"]:
        raise MeasurementInvalid(f"the pool holds {batch} requests of {cell.context} tokens but the engine runs only "
                                 f"{spec.engine['max_running_requests']} at once.")
    if room.enter(batch, cell.context):
        session.flush()
        session.prompts = []
    session.prompts += session.source.take(max(batch - len(session.prompts), 0), cell.context)
    prompts = session.prompts[:batch]
    begin = time.monotonic()
    session.call("fill", 0, cell, prompts, 1)
    filled = time.monotonic() - begin
    for number in range(spec.warmups):
        for new_tokens in spec.new_tokens:
            session.call("warmup", number, cell, prompts, new_tokens)
    rates = []
    for number in range(spec.repeats):
        first, second = (session.call("timed", number, cell, prompts, new).seconds for new in spec.new_tokens)
        rates.append(batch * (spec.new_tokens[1] - spec.new_tokens[0]) / (second - first))
    say(f"{cell.workload} {batch} x {cell.context}: {statistics.median(rates):.0f} tokens/s (filled in {filled:.1f} s)")
    return None


def measure_ttft(session: Session, cell: Cell) -> None:
    """One request at a time, one new token; a prompt whose first part is cached, if the cell says so."""
    spec = session.spec
    session.flush()
    known = session.source.take(1, cell.cached)[0] if cell.cached else []
    if known:
        session.call("fill", 0, cell, [known], 1)
    rounds: Iterator[tuple[Kind, int]] = iter([("warmup", n) for n in range(spec.warmups + 1)]
                                              + [("timed", n) for n in range(spec.ttft_repeats)])
    seconds = []
    for kind, number in rounds:
        (rest,) = session.source.take(1, cell.context - cell.cached)
        call = session.call(kind, number, cell, [known + rest], 1)
        seconds += [call.seconds] if kind == "timed" else []
    say(f"{cell.workload} {cell.context} tokens, {cell.cached} cached: {1000 * statistics.median(seconds):.1f} ms")


def run(spec: SpeedSpec) -> SpeedResult:
    """Everything the spec asks for, on one engine."""
    from sglang.srt.entrypoints.engine import Engine

    begin = time.monotonic()
    engine = Engine(**spec.engine)
    seconds = {"start": time.monotonic() - begin}
    say(f"engine ready after {seconds['start']:.0f} s")
    skipped = []
    try:
        kvtuner = engine.get_server_info()["kvtuner"]
        if (kvtuner["enabled"], kvtuner["page_size"]) != (spec.enabled, spec.page_size):
            raise MeasurementInvalid("same_format: the engine does not say that it serves the format asked for, in "
                                     f"pages of {spec.page_size}.")
        say(f"{kvtuner['max_total_num_tokens']} tokens of keys and values")
        session = Session(engine, spec, kvtuner["max_total_num_tokens"])
        for cell in spec.cells:
            begin = time.monotonic()
            if cell.workload in ("ttft", "ttft_cached"):
                measure_ttft(session, cell)
            elif reason := measure_decode(session, cell):
                say(reason)
                skipped.append(reason)
            name = f"{cell.workload} {cell.batch or 'all'} x {cell.context}"
            seconds[name] = time.monotonic() - begin
    finally:
        engine.shutdown()
    return SpeedResult(kvtuner, seconds, skipped)


if __name__ == "__main__":
    try:
        run(SpeedSpec.read(Path(sys.argv[1]))).write(Path(sys.argv[2]))
    except UserError as error:
        say(f"refused: {error}")
        sys.exit(2)
