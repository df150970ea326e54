"""From the answers of every layout to what the record keeps and the console says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvtuner_sglang.agreement.answers import Answer
from kvtuner_sglang.agreement.compare import FLOORS, enough, moved, texts_equal, within
from kvtuner_sglang.errors import MeasurementInvalid
from kvtuner_sglang.evidence.assemble import Figures
from kvtuner_sglang.evidence.record import KVRecord, Metric, metric_key
from kvtuner_sglang.measure.metrics import summarize

REFERENCE, FLOOR = "single", "single_with_noise"
DIFFERENCE = "logprob_difference"
RULES = (
    "http_200: The server answered, and answered 200.",
    "tokens_as_asked: The server counted the prompt tokens that were sent, and returned the output tokens asked for, "
    "each with its log-probability.",
    "finite: Every log-probability is a number.",
    "same_requests: Every layout got the same token ids in the same order, on a server just started and verified.",
    "compared: Log-probabilities are compared up to the first token that differs.",
)


@dataclass(frozen=True)
class AnswerSample:
    """One answer; `server` is the layout, "single" the reference, "single_with_noise" the floor; ids are tokens."""

    server: str
    request: int
    output_ids: list[int]
    log_probabilities: list[float]
    cached_tokens: int
    retractions: int


def samples(server: str, answers: Sequence[Answer]) -> list[AnswerSample]:
    return [AnswerSample(server, number, answer.tokens, answer.log_probabilities, answer.cached, answer.retractions)
            for number, answer in enumerate(answers)]


def figures(reference: Sequence[Answer], others: Mapping[str, Sequence[Answer]], kv: KVRecord) -> Figures:
    """Of each of `others`, keyed /dist=NAME: logprob_difference (nats, one value a token), texts_equal, within.

    The floor, if there is one, is the entry FLOOR.  Raises MeasurementInvalid if no token can be compared.
    """
    metrics: dict[str, Metric] = {}
    warnings = []
    for name, answers in others.items():
        values = moved(reference, answers)
        if not len(values):
            raise MeasurementInvalid(f"compared: {name} and {REFERENCE} have no token in common.")
        if not enough(values, reference):
            warnings.append(f"Of {name} only {len(values)} tokens were left to compare.")
        metrics[metric_key(DIFFERENCE, dist=name)] = summarize(values.tolist(), "nat")
        metrics[metric_key("texts_equal", dist=name)] = summarize([texts_equal(reference, answers)], "texts")
    metrics["prompts"] = summarize([len(reference)], "texts")
    floor = metrics.get(metric_key(DIFFERENCE, dist=FLOOR))
    for name in [name for name in others if name != FLOOR]:
        found = metrics[metric_key(DIFFERENCE, dist=name)]
        equal = round(metrics[metric_key("texts_equal", dist=name)].mean)
        metrics[metric_key("within", dist=name)] = summarize([within(found, floor, equal, len(reference))], "0 or 1")
    return Figures(metrics, RULES, tuple(warnings), kv)


def row(metrics: Mapping[str, Metric], dist: str) -> dict[str, Any]:
    """The figures of one layout; of the floor null where there was none."""
    found, floor = metrics[f"{DIFFERENCE}/dist={dist}"], metrics.get(f"{DIFFERENCE}/dist={FLOOR}")
    return {
        "dist": dist, "floor_mean": floor.mean if floor else None, "floor_max": floor.max if floor else None,
        "mean": found.mean, "max": found.max, "tokens": found.n,
        "texts_equal": round(metrics[f"texts_equal/dist={dist}"].mean), "prompts": round(metrics["prompts"].mean),
        "within": bool(metrics[f"within/dist={dist}"].mean),
    }


def rows(metrics: Mapping[str, Metric]) -> list[dict[str, Any]]:
    """A row a layout, in the order in which they were asked."""
    prefix = f"{DIFFERENCE}/dist="
    names = [key.removeprefix(prefix) for key in metrics if key.startswith(prefix)]
    return [row(metrics, name) for name in names if name != FLOOR]


def table(found: Figures) -> list[str]:
    """Lines for the console: every layout beside what was asked of it."""
    lines = []
    for each in rows(found.metrics):
        line = f"  {each['dist']:<12} mean {each['mean']:.3g} max {each['max']:.3g} nat over {each['tokens']} tokens"
        if each["floor_mean"] is not None:
            line += f" (floor {each['floor_mean']:.3g}, {each['floor_max']:.3g}; asked: at most {FLOORS} x)"
        else:
            line += " (asked: all texts equal)"
        lines.append(f"{line}, {each['texts_equal']} of {each['prompts']} texts equal: "
                     f"{'within' if each['within'] else 'NOT within'}")
    return lines + [f"  warning      {warning}" for warning in found.warnings]
