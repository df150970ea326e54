"""When a call counts.  One function per rule; the first violation raises MeasurementInvalid with its reason."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvtuner_sglang.config import RunConfig
from kvtuner_sglang.errors import MeasurementInvalid
from kvtuner_sglang.plugin.attention_choice import choose_attention
from kvtuner_sglang.serving.verify import PACKED_POOL, PLAIN_POOL
from kvtuner_sglang.speed import plan
from kvtuner_sglang.speed.calls import Call, SpeedSpec

Rule = Callable[[Call, SpeedSpec], str | None]


def prompts_as_sent(call: Call, spec: SpeedSpec) -> str | None:
    """The engine counted as many prompt tokens as were sent."""
    if call.prompt_min == call.prompt_max == call.context:
        return None
    return f"the engine counted {call.prompt_min} to {call.prompt_max} prompt tokens, {call.context} were sent"


def outputs_as_asked(call: Call, spec: SpeedSpec) -> str | None:
    """Every request got as many tokens as were asked for."""
    if call.output_min == call.output_max == call.new_tokens:
        return None
    return f"the engine wrote {call.output_min} to {call.output_max} tokens, {call.new_tokens} were asked for"


def cached_as_planned(call: Call, spec: SpeedSpec) -> str | None:
    """The prefix cache held what it must, to a page, of every prompt, and nothing of a cold one."""
    if call.kind == "fill":
        return None
    low = max(call.cached - spec.page_size, 0)
    if low <= call.cached_min and call.cached_max <= call.cached:
        return None
    return f"{call.cached_min} to {call.cached_max} tokens came from the prefix cache, {low} to {call.cached} should"


def never_retracted(call: Call, spec: SpeedSpec) -> str | None:
    """No request was put back into the queue for lack of memory."""
    return f"{call.retractions} requests were put back into the queue" if call.retractions else None


def all_at_once(call: Call, spec: SpeedSpec) -> str | None:
    """All requests of a decode cell ran in the same step, by the engine's log."""
    if call.new_tokens == 1 or call.running == call.batch:
        return None
    return f"at most {call.running or 0} requests ran at once, not {call.batch}"


def in_graphs(call: Call, spec: SpeedSpec) -> str | None:
    """On a GPU every logged decode step was a CUDA graph."""
    if spec.device == "cpu" or call.new_tokens == 1 or call.graph:
        return None
    return "decode steps ran without a CUDA graph"


CALL_RULES: tuple[Rule, ...] = (prompts_as_sent, outputs_as_asked, cached_as_planned, never_retracted, all_at_once,
                                in_graphs)
RUN_RULES = {
    "distinct_prompts": "No two prompts begin with the same token.",
    "warm_up": "Calls of the same shape went before the measured ones.",
    "longer_takes_longer": "In every round the longer answers took longer.",
    "faster_than_floor": "On a GPU that measure/hardware.py lists, nothing beat its memory and its arithmetic.",
    "same_format": "The engine reports the format, the pool, the dtype and the attention that were asked for.",
}


def rules_held() -> tuple[str, ...]:
    """A sentence per rule, for the record of a run that broke none."""
    return (*(f"{rule.__name__}: {(rule.__doc__ or '').strip()}" for rule in CALL_RULES),
            *(f"{name}: {sentence}" for name, sentence in RUN_RULES.items()))


def require_call(call: Call, spec: SpeedSpec) -> None:
    """Raise MeasurementInvalid naming the first rule that this call breaks."""
    for rule in CALL_RULES:
        if reason := rule(call, spec):
            raise MeasurementInvalid(f"{rule.__name__}: {reason} ({call.workload}, {call.batch} x {call.context} "
                                     f"tokens, {call.new_tokens} new, {call.kind} {call.round}).")


def require_engine(rank: Mapping[str, Any], config: RunConfig, spec: SpeedSpec) -> None:
    """Raise MeasurementInvalid unless an engine's rank says of itself what was asked for."""
    enabled = config.quant.enabled
    attention = (choose_attention(config.server.attention, spec.device == "cpu") if enabled
                 else plan.attention_backend(False, config.speed.backend, spec.device))
    told = str(rank["attention"])
    found = (rank["pool_class"], rank["dtype"], told.partition(",")[0] if enabled else told)  # "fused, portable decode"
    asked = (PACKED_POOL if enabled else PLAIN_POOL, plan.kv_dtype(config.quant, spec.engine["dtype"]), attention)
    for name, mine, its in zip(("pool", "dtype", "attention"), asked, found, strict=True):
        if its != mine:
            raise MeasurementInvalid(f"same_format: the engine says that its {name} is {its} but quant="
                                     f"{config.quant.name} asks for {mine}: look at its log.")


def require_longer(first: Sequence[float], second: Sequence[float], where: str) -> None:
    """Raise MeasurementInvalid if the longer answers of a round did not take longer."""
    for number, (short, long) in enumerate(zip(first, second, strict=True)):
        if long <= short:
            raise MeasurementInvalid(f"longer_takes_longer: in round {number} of {where} the longer answers took "
                                     f"{long:.4f} s and the shorter ones {short:.4f} s: free the machine.")


def require_above_floor(value_ms: float, floor_ms: float | None, where: str) -> None:
    """Raise MeasurementInvalid if a time is below what the hardware can do."""
    if floor_ms is not None and value_ms < floor_ms:
        raise MeasurementInvalid(f"faster_than_floor: {where} took {value_ms:.3f} ms, less than the {floor_ms:.3f} ms "
                                 "that this GPU needs at least.")
