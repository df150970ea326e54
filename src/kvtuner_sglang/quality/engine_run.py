"""One real sglang.Engine in a process of its own:  python -m kvtuner_sglang.quality.engine_run SPEC.json RESULT.json

Lines of progress go to stdout, everything SGLang says to stderr.  By the visibility rule one ordinary prefill
measures what is served, so prose takes no decode step.
"""

import itertools
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from kvtuner_sglang.errors import MeasurementInvalid, UserError
from kvtuner_sglang.quality import window_logits
from kvtuner_sglang.quality.compare import TokenRows, compare_logits
from kvtuner_sglang.quality.engine_spec import EngineResult, EngineSpec, Questions, window_file

PROGRESS_S = 10.0
PROSE_FILE = "prose.json"


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def start(spec: EngineSpec, logits_dir: Path) -> Any:
    """The engine; raises whatever SGLang raises."""
    from sglang.srt.entrypoints.engine import Engine

    arguments: dict[str, Any] = {"disable_overlap_schedule": True}  # no pass beyond the last token asked for
    if spec.device == "cpu":
        arguments["grammar_backend"] = "none"
    if spec.page_size is not None:
        arguments["page_size"] = spec.page_size
    if not spec.plugin.get("enable_kvtuner_quant"):
        arguments["attention_backend"] = "torch_native"  # fp32 throughout; the fused ones multiply in TF32 or 16 bits
    return Engine(
        model_path=spec.model_path, device=spec.device, dtype=spec.dtype, context_length=spec.context_length,
        max_running_requests=spec.max_running_requests, chunked_prefill_size=spec.chunked_prefill_tokens,
        random_seed=spec.seed, disable_cuda_graph=True, port=spec.port,
        sampling_backend="pytorch", log_level="warning", kvtuner_logits_dir=str(logits_dir), **spec.plugin, **arguments,
    )


def measure_window(engine: Any, spec: EngineSpec, number: int, logits_dir: Path) -> dict[str, list[float | None]]:
    """Prefill one window; compare its logits with the reference's, or leave them there."""
    tokens = spec.windows[number]
    window_logits.clear(logits_dir)
    answer = engine.generate(input_ids=tokens, sampling_params={"max_new_tokens": 1, "temperature": 0.0},
                             return_logprob=True, logprob_start_len=0)
    cached = answer["meta_info"]["cached_tokens"]
    if cached:
        raise MeasurementInvalid(f"{cached} tokens of window {number} came from the prefix cache.")
    logits = window_logits.collect(logits_dir, len(tokens))
    reported = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
    window_logits.check_order(logits, tokens, reported, spec.dtype)
    window_logits.clear(logits_dir)
    if spec.reference_dir is None:
        np.save(window_file(logits_dir.parent, number), logits)
        return {}
    full = np.load(window_file(Path(spec.reference_dir), number), mmap_mode="r")
    return as_lists(compare_logits(full, logits, tokens, spec.device))


def as_lists(rows: TokenRows) -> dict[str, list[float | None]]:
    """The rows as JSON can hold them: six significant digits, null for the last negative log-probability."""
    columns = {"kl": rows.kl, "agree": rows.agree, "nll_full": rows.nll_full, "nll": rows.nll}
    return {name: [None if np.isnan(x) else float(f"{x:.6g}") for x in column] for name, column in columns.items()}


def ask(engine: Any, name: str, asked: Questions, spec: EngineSpec, logits_dir: Path) -> list[str]:
    """What greedy decoding would write, judged along the right answer: one prefill of prompt and answer.

    By the visibility rule a prefill reads what decoding reads, so decoding writes the right answer exactly when the
    most likely token at each of its positions is the answer's own; the position after it shows whether it ends there.
    """
    tokenizer = engine.tokenizer_manager.tokenizer
    texts: list[str] = []
    last_said = time.monotonic()
    pairs = iter(zip(asked.prompts, asked.answers, strict=True))
    while batch := list(itertools.islice(pairs, 4 * spec.max_running_requests)):
        answers = engine.generate(
            input_ids=[prompt + answer for prompt, answer in batch],
            sampling_params={"max_new_tokens": 1, "temperature": 0.0}, return_logprob=True,
            logprob_start_len=[len(prompt) - 1 for prompt, _ in batch], top_logprobs_num=1,
        )
        texts += [tokenizer.decode(likeliest(got, len(right))) for got, (_, right) in zip(answers, batch, strict=True)]
        window_logits.clear(logits_dir)  # every pass writes there
        if time.monotonic() - last_said > PROGRESS_S:
            last_said = time.monotonic()
            say(f"{name}: {len(texts)} of {len(asked.prompts)}")
    return texts


def likeliest(got: dict[str, Any], answer_tokens: int) -> list[int]:
    """The most likely token at each of the answer's positions and at the one after; raises MeasurementInvalid."""
    top = got["meta_info"]["input_top_logprobs"][1:]  # the first entry belongs to the prompt and is empty
    if len(top) != answer_tokens:
        raise MeasurementInvalid(f"the engine reported {len(top)} positions of an answer of {answer_tokens} tokens.")
    return [position[0][1] for position in top] + list(got["output_ids"][:1])


def run(spec: EngineSpec) -> EngineResult:
    """Everything the spec asks for, on one engine."""
    logits_dir = Path(spec.out_dir) / "passes"
    seconds: dict[str, float] = {}

    def timed(name: str, begin: float) -> None:
        seconds[name] = seconds.get(name, 0.0) + time.monotonic() - begin

    begin = time.monotonic()
    engine = start(spec, logits_dir)
    timed("start", begin)
    say(f"engine ready after {seconds['start']:.0f} s")
    try:
        kvtuner = engine.get_server_info()["kvtuner"]
        if kvtuner["enabled"] != bool(spec.plugin.get("enable_kvtuner_quant")):
            raise MeasurementInvalid("the engine does not say that it serves the format asked for.")
        rows = []
        for number in range(len(spec.windows)):
            begin = time.monotonic()
            rows.append(measure_window(engine, spec, number, logits_dir))
            timed("prose", begin)
            say(f"window {number + 1} of {len(spec.windows)}: {len(spec.windows[number])} tokens")
        rows = [r for r in rows if r]
        EngineResult(kvtuner, {}, rows, seconds).write(Path(spec.out_dir) / PROSE_FILE)  # if the rest is cut off
        texts = {}
        for name, asked in spec.questions.items():
            begin = time.monotonic()
            texts[name] = ask(engine, name, asked, spec, logits_dir)
            timed(name, begin)
    finally:
        engine.shutdown()
    return EngineResult(kvtuner, texts, rows, seconds)


if __name__ == "__main__":
    try:
        run(EngineSpec.read(Path(sys.argv[1]))).write(Path(sys.argv[2]))
    except UserError as error:
        say(f"refused: {error}")
        sys.exit(2)
