"""When a measurement counts.  One function per rule; the first violation raises MeasurementInvalid with its reason.

The seed report's script posted to a node that answers HTTP 404 with a JSON body, took any JSON for a success and so
timed error messages.  `http_200` and the token rules refuse exactly that.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

from kvtuner_sglang.errors import MeasurementInvalid
from kvtuner_sglang.load.config import ROUNDS
from kvtuner_sglang.serving.client import Sample

MAX_DISPATCH_SHARE = 0.10  # of the time that closed-loop workers had, spent between an answer and the next request
MONOTONE_NOISE = 0.8  # a longer prompt faster than this share of a shorter one's time is worth a warning


def http_200(sample: Sample) -> str | None:
    """The server answered, and answered 200."""
    if sample.http_status is None:
        return f"no HTTP answer ({sample.error})"
    return None if sample.http_status == 200 else f"HTTP status {sample.http_status}"


def no_error(sample: Sample) -> str | None:
    """Neither the stream nor the connection reported an error: SGLang can put one into a 200 stream."""
    return f"error in the answer: {sample.error}" if sample.error else None


def prompt_tokens_as_sent(sample: Sample) -> str | None:
    """The server counted as many prompt tokens as were sent."""
    if sample.prompt_tokens == sample.prompt_tokens_sent:
        return None
    return f"the server counted {sample.prompt_tokens} prompt tokens, {sample.prompt_tokens_sent} were sent"


def output_tokens_by_meta(sample: Sample) -> str | None:
    """The server's meta information counts the number of output tokens that was asked for."""
    if sample.output_tokens == sample.output_tokens_asked:
        return None
    return f"the server counted {sample.output_tokens} output tokens, {sample.output_tokens_asked} were asked for"


def output_tokens_by_stream(sample: Sample) -> str | None:
    """As many output tokens came through the stream as were asked for."""
    if sample.stream_tokens == sample.output_tokens_asked:
        return None
    return f"{sample.stream_tokens} tokens came through the stream, {sample.output_tokens_asked} were asked for"


def text_not_empty(sample: Sample) -> str | None:
    """There is generated text."""
    return None if sample.text else "the generated text is empty"


def times_in_order(sample: Sample) -> str | None:
    """Sent, first token and end follow each other, each of them known."""
    tokens, ended = sample.token_times_s, sample.ended_s
    if tokens and ended is not None:
        times = [*tokens, ended]
        if times == sorted(times) and sample.sent_s < tokens[0]:
            return None
    return f"sent at {sample.sent_s}, tokens at {tokens}, ended at {ended}: not in this order"


def cold_cache(sample: Sample) -> str | None:
    """As many prompt tokens came from the prefix cache as the test put there: none in a cold one."""
    if sample.cached_tokens == sample.cached_tokens_planned:
        return None
    return (f"{sample.cached_tokens} prompt tokens came from the prefix cache, {sample.cached_tokens_planned} were "
            "planned")


SAMPLE_RULES: tuple[Callable[[Sample], str | None], ...] = (
    http_200, prompt_tokens_as_sent, output_tokens_by_meta, output_tokens_by_stream, text_not_empty, times_in_order,
    cold_cache, no_error,
)  # the client calls most of these an error, too: the last rule is for what no other one names


RUN_RULES = {
    "unique_prompts": "No two prompts of a test begin with the same token.",
    "warm_up": "Requests of the same length, and as many at once, were answered before the measured ones.",
    "enough_requests": f"Every concurrency had at least {ROUNDS} requests per worker.",
    "fast_client": f"The client's workers idled at most {MAX_DISPATCH_SHARE:.0%} of the time.",
    "plain_server": "No measurement-only flag was in force.",
    "same_server": "The same server, format and ranks answered before and after the tests.",
    "wrong_server": "Model, plan, versions, layers and byte budget of every rank are those asked for.",
    "unquantized_pool": "Where quantization was asked for, every rank has our pool.",
    "faster_than_floor": "No token came before this machine could compute it, nor a median step faster than it reads.",
    "constant_time": "Answers of twice the tokens and more, if any, took longer than short ones by those steps' floor.",
}


def rules_held() -> tuple[str, ...]:
    """A sentence per rule, for the record of a run that broke none."""
    of_samples = (f"{rule.__name__}: {(rule.__doc__ or '').strip()}" for rule in SAMPLE_RULES)
    return (*of_samples, *(f"{name}: {sentence}" for name, sentence in RUN_RULES.items()))


def violation(sample: Sample) -> str | None:
    """ "rule: reason" of the first rule that this request breaks, or None if it is a success."""
    for rule in SAMPLE_RULES:
        if reason := rule(sample):
            said = f" ({sample.error})" if sample.error and sample.error not in reason else ""
            return f"{rule.__name__}: {reason}{said}"
    return None


def require_valid(samples: Iterable[Sample]) -> None:
    """Raise MeasurementInvalid naming the first request that breaks a rule, and how many of them do."""
    checked = [(sample, violation(sample)) for sample in samples]
    broken = [(sample, reason) for sample, reason in checked if reason]
    if broken:
        sample, reason = broken[0]
        raise MeasurementInvalid(
            f"{sample.kind} request {sample.request_id} ({sample.prompt_tokens_sent} prompt tokens) does not count, "
            f"{reason}; {len(broken)} of {len(checked)} requests failed."
        )


def require_unique(prompts: Sequence[Sequence[int]]) -> None:
    """Raise MeasurementInvalid if two prompts begin with the same token: they could share cached pages."""
    first_ids = [prompt[0] for prompt in prompts]
    if len(set(first_ids)) != len(first_ids):
        raise MeasurementInvalid(f"unique_prompts: only {len(set(first_ids))} of {len(first_ids)} prompts begin with "
                                 "a token of their own, so a prefix may have been cached.")


def require_warm_up(warm_ups: Sequence[Sample], prompt_tokens: int) -> None:
    """Raise MeasurementInvalid unless a request of this very length was answered before the measured ones."""
    if not any(sample.prompt_tokens_sent == prompt_tokens for sample in warm_ups):
        raise MeasurementInvalid(f"warm_up: no request of {prompt_tokens} tokens went before the measured ones: "
                                 "set the workload's warmup to 1 or more.")
    require_valid(warm_ups)


def server_identity(info: dict[str, Any]) -> tuple[Any, ...]:
    """What stays equal exactly while the same server, with the same format and ranks, is answering."""
    kvtuner = info["kvtuner"]
    return (info["startup_time"], kvtuner["plan_hash"], kvtuner["enabled"],
            tuple((rank["host"], rank["pid"]) for rank in kvtuner["ranks"]))


def require_same_server(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raise MeasurementInvalid if the server that answers now is not the one of the start."""
    if server_identity(before) != server_identity(after):
        raise MeasurementInvalid("same_server: start time, format or ranks differ before and after the tests, so the "
                                 "server was replaced in between.")


def require_plain_server(info: dict[str, Any]) -> None:
    """Raise MeasurementInvalid if a measurement-only flag, which changes results or speed, is in force."""
    in_force = {name: value for name, value in info["kvtuner"]["measurement"].items() if value}
    if in_force:
        raise MeasurementInvalid(f"plain_server: measurement-only flags are in force ({in_force}): start without them.")


def require_enough_requests(requests: int, concurrency: Sequence[int]) -> None:
    """Raise MeasurementInvalid, before anything is sent, if a level has fewer than ROUNDS requests per worker.

    requests: of the level with most workers.
    """
    if requests < ROUNDS * max(concurrency):
        raise MeasurementInvalid(f"enough_requests: {requests} requests are less than {ROUNDS} for each of "
                                 f"{max(concurrency)} workers: raise workload.throughput.requests or rounds.")


def require_fast_client(dispatch_s: Sequence[float], wall_s: float, concurrency: int) -> None:
    """Raise MeasurementInvalid if the client's workers idled: then the load was not the concurrency it claims to be.

    dispatch_s: seconds between an answer's end and the worker's next request, one per such pair.
    """
    share = sum(dispatch_s) / (wall_s * concurrency)
    if share > MAX_DISPATCH_SHARE:
        raise MeasurementInvalid(f"fast_client: the client's workers idled {share:.0%} of the time at concurrency "
                                 f"{concurrency}: free the machine it runs on.")


def monotone_warnings(ttft_ms: dict[int, float]) -> list[str]:
    """Sentences about longer prompts that were answered clearly faster than shorter ones: odd, yet not an error."""
    lengths = sorted(ttft_ms)
    return [
        f"TTFT p50 at {longer} tokens ({ttft_ms[longer]:.1f} ms) is clearly below that at {shorter} tokens "
        f"({ttft_ms[shorter]:.1f} ms)."
        for shorter, longer in pairwise(lengths)
        if ttft_ms[longer] < MONOTONE_NOISE * ttft_ms[shorter]
    ]
