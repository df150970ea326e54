"""From calls to what the record keeps: metrics with every round counted, the KV cache, warnings."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvtuner_sglang.config import RunConfig
from kvtuner_sglang.evidence.assemble import Figures
from kvtuner_sglang.evidence.record import KVRecord, Metric, metric_key
from kvtuner_sglang.measure.hardware import MS_PER_S, Floor
from kvtuner_sglang.measure.memory import ITEMSIZE, kv_record
from kvtuner_sglang.measure.metrics import summarize
from kvtuner_sglang.quant import KVShape
from kvtuner_sglang.serving.dummy_checkpoint import RANDOM_WEIGHTS, is_dummy
from kvtuner_sglang.speed import validity
from kvtuner_sglang.speed.calls import Call, SpeedResult

NO_FLOOR = "The peaks of this device are not listed, so no time was held against its physical floor."


@dataclass(frozen=True)
class EngineSample:
    """The first line of the samples: what the engine was started with, what it says about its cache, how long it took.

    attention, dtype: which backend read the cache and what its elements are, by the engine's own word.
    """

    kind: str
    attention: str
    dtype: str
    arguments: dict[str, Any]
    kvtuner: dict[str, Any]
    seconds: dict[str, float]


def decode_rates(batch: int, new_tokens: tuple[int, int], first_s: Sequence[float],
                 second_s: Sequence[float]) -> list[float]:
    """Tokens/s of each round: what the longer answers have more of, over what they took longer.

    Prefill, admission and the engine's own overhead are in both times and cancel.
    """
    tokens = batch * (new_tokens[1] - new_tokens[0])
    return [tokens / (second - first) for first, second in zip(first_s, second_s, strict=True)]


def decode_metrics(calls: Sequence[Call], new_tokens: tuple[int, int], floor: Floor) -> dict[str, Metric]:
    """decode_tok_s and tpot_ms at batch and context; the same after "saturation_" where the pool was full."""
    timed = [call for call in calls if call.kind == "timed" and call.workload in ("decode", "saturation")]
    metrics: dict[str, Metric] = {}
    for workload, batch, context in _cells(timed):
        cell = [call for call in timed if (call.workload, call.batch, call.context) == (workload, batch, context)]
        first, second = ([call.seconds for call in cell if call.new_tokens == n] for n in new_tokens)
        validity.require_longer(first, second, f"{batch} x {context}")
        rates = decode_rates(batch, new_tokens, first, second)
        tpot = [MS_PER_S * batch / rate for rate in rates]
        validity.require_above_floor(min(tpot), floor.decode_step_ms(batch, context), f"a step of {batch} x {context}")
        prefix = "saturation_" if workload == "saturation" else ""
        metrics[metric_key(f"{prefix}decode_tok_s", batch=batch, context=context)] = summarize(rates, "tok/s")
        metrics[metric_key(f"{prefix}tpot_ms", batch=batch, context=context)] = summarize(tpot, "ms")
    return metrics


def ttft_metrics(calls: Sequence[Call], floor: Floor) -> dict[str, Metric]:
    """ttft_ms at prompt_tokens, ttft_cached_ms at cached and new tokens: from the call to its only answer."""
    metrics: dict[str, Metric] = {}
    timed = [call for call in calls if call.kind == "timed" and call.workload in ("ttft", "ttft_cached")]
    for workload, cached, context in sorted({(call.workload, call.cached, call.context) for call in timed}):
        took = [MS_PER_S * call.seconds for call in timed
                if (call.workload, call.cached, call.context) == (workload, cached, context)]
        validity.require_above_floor(min(took), floor.prefill_ms(cached, context - cached), f"{context} tokens")
        key = (metric_key("ttft_cached_ms", cached=cached, new=context - cached) if cached
               else metric_key("ttft_ms", prompt_tokens=context))
        metrics[key] = summarize(took, "ms")
    return metrics


def _cells(calls: Iterable[Call]) -> list[tuple[str, int, int]]:
    """In the order in which they were measured."""
    return list(dict.fromkeys((call.workload, call.batch, call.context) for call in calls))


def figures(result: SpeedResult, calls: Sequence[Call], config: RunConfig, floor: Floor,
            arguments: dict[str, Any]) -> Figures:
    """Everything of a finished run, `arguments` the engine's; raises MeasurementInvalid if a figure cannot be."""
    kv = kv_record(result.kvtuner, config)
    metrics = kv_metrics(result.kvtuner, kv, config, arguments["max_running_requests"])
    metrics |= ttft_metrics(calls, floor) | decode_metrics(calls, config.speed.new_tokens, floor)
    warnings = [*result.skipped]
    warnings += [RANDOM_WEIGHTS] if is_dummy(config.model) else []
    warnings += [NO_FLOOR] if floor.peak is None else []
    return Figures(metrics, validity.rules_held(), tuple(warnings), kv)


def kv_metrics(state: dict[str, Any], kv: KVRecord, config: RunConfig, max_running_requests: int) -> dict[str, Metric]:
    """kv_tokens as the engine reports them; kv_tokens_formula: what quant/ says its budget holds, tails counted."""
    (rank,) = state["ranks"]
    metrics = {"kv_tokens": summarize([kv.tokens], "tokens")}
    if rank["budget_bytes"] is not None:
        shape = KVShape(rank["kv_heads"], rank["head_dim"], ITEMSIZE[rank["dtype"]], kv.page_size)
        plan = config.quant.plan(rank["layers"][1])
        tails = shape.tail_bytes_per_slot(plan) * (max_running_requests + 1)
        metrics["kv_budget_bytes"] = summarize([rank["budget_bytes"]], "bytes")
        metrics["kv_tokens_formula"] = summarize([(rank["budget_bytes"] - tails) // shape.bytes_per_token(plan)],
                                                 "tokens")
    return metrics
