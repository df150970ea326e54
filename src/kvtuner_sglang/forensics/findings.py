"""From node 1's replies to what the record keeps: never as a time to first token, and only if they are what they seem.

The run counts only if the seed's failure happened: every reply of node 1 an error in JSON that the script takes for a
success, and one request by our own client to the same node refused by the rules of measure/validity.py.
"""

from collections.abc import Sequence

from kvtuner_sglang.errors import MeasurementInvalid
from kvtuner_sglang.evidence.record import Metric, metric_key
from kvtuner_sglang.forensics.as_the_script import LOADED_REPLY, REPLY, NodeReply
from kvtuner_sglang.measure import validity
from kvtuner_sglang.measure.metrics import summarize
from kvtuner_sglang.serving.client import Sample

NOT_FOUND = 404
RULES = (
    "node1_answers_404: Every reply of node 1 had HTTP status 404 and a body of JSON, and none held a token.",
    "node1_is_refused: Our client's request to node 1 broke rule http_200, so no such reply can become a figure here.",
    "The rules below held for the same tests against node 0.",
)


def require_not_found(replies: Sequence[NodeReply]) -> None:
    """Raise MeasurementInvalid unless all replies are what the seed's script took for answers."""
    other = [reply for reply in replies if reply.http_status != NOT_FOUND or not reply.success_to_the_script]
    if other:
        first = other[0]
        raise MeasurementInvalid(f"node1_answers_404: {len(other)} of {len(replies)} replies of node 1 are something "
                                 f"else, the first HTTP {first.http_status} {first.body[:60]!r}: this SGLang does not "
                                 "behave as the seed's did.")


def require_refused(checked: Sample) -> None:
    """Raise MeasurementInvalid unless our own client's request to node 1 breaks http_200."""
    reason = validity.violation(checked) or "it broke no rule"
    if not reason.startswith("http_200: HTTP status 404"):
        raise MeasurementInvalid(f"node1_is_refused: our client's request to node 1 was not refused as HTTP 404 "
                                 f"({reason}).")


def reply_metrics(replies: Sequence[NodeReply]) -> dict[str, Metric]:
    """node1_reply_ms by prompt length; by concurrency node1_loaded_reply_ms, node1_replies_per_s and two ratios.

    node1_script_success_ratio is what the script counts, node1_http_200_ratio what there was.
    """
    metrics: dict[str, Metric] = {}
    single = [reply for reply in replies if reply.kind == REPLY]
    for tokens in dict.fromkeys(reply.prompt_tokens for reply in single):
        metrics[metric_key("node1_reply_ms", prompt_tokens=tokens)] = summarize(
            [reply.reply_ms for reply in single if reply.prompt_tokens == tokens], "ms")
    loaded = [reply for reply in replies if reply.kind == LOADED_REPLY]
    for concurrency in dict.fromkeys(reply.concurrency for reply in loaded):
        level = [reply for reply in loaded if reply.concurrency == concurrency]
        seconds = max(reply.ended_s for reply in level) - min(reply.sent_s for reply in level)
        for name, values, unit in (
            ("node1_loaded_reply_ms", [reply.reply_ms for reply in level], "ms"),
            ("node1_replies_per_s", [len(level) / seconds], "1/s"),
            ("node1_script_success_ratio", [float(reply.success_to_the_script) for reply in level], "ratio"),
            ("node1_http_200_ratio", [float(reply.http_status == 200) for reply in level], "ratio"),
        ):
            metrics[metric_key(name, concurrency=concurrency)] = summarize(values, unit)
    return metrics
