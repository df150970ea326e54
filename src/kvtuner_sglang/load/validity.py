"""When a load counts: the rules of measure/validity.py for every request, and those of a load."""

from collections.abc import Sequence

import numpy as np

from kvtuner_sglang.errors import MeasurementInvalid
from kvtuner_sglang.load.config import LoadWorkload, MultiturnLoad
from kvtuner_sglang.load.figures import MS_PER_S
from kvtuner_sglang.load.plan import Conversation
from kvtuner_sglang.measure import validity
from kvtuner_sglang.serving.client import Sample

# The schedule counts from when the first request's coroutine ran, a turn of the event loop after bench_serving began to
# wait for the second; a sleep ends late, never early.
EARLY_MS = 10.0
# constant_time is not among them: all answers of a load have one length, so there is nothing to tell apart.
SHARED_RULES = ("warm_up", "plain_server", "same_server", "wrong_server", "unquantized_pool", "faster_than_floor")
CLOSED_RULES = {"fast_client": validity.RUN_RULES["fast_client"]}
OPEN_RULES = {"on_schedule": "No request left before its schedule, 99 of 100 max_dispatch_lag_ms after it at most."}
RETRACTIONS_RULE = "The server counted every request's retractions."
UNIQUE_RULE = "No two prompts of a batch go on with the same token behind what they share by plan."


def rules_held(workload: LoadWorkload) -> tuple[str, ...]:
    """A sentence per rule, for the record of a load that broke none."""
    of_samples = {rule.__name__: (rule.__doc__ or "").strip() for rule in validity.SAMPLE_RULES}
    of_run = {name: validity.RUN_RULES[name] for name in SHARED_RULES}
    of_loop = CLOSED_RULES if workload.kind in ("closed", "multiturn") else OPEN_RULES
    held = {**of_samples, "unique_prompts": UNIQUE_RULE, "retractions_reported": RETRACTIONS_RULE, **of_run, **of_loop}
    return tuple(f"{name}: {sentence}" for name, sentence in held.items())


def require_unique(conversations: Sequence[Conversation], workload: LoadWorkload) -> None:
    """Raise MeasurementInvalid if two conversations share more than the workload says."""
    validity.require_unique([turns[0].input_ids[workload.shared :] for turns in conversations])


def require_retractions_reported(samples: Sequence[Sample]) -> None:
    """Raise MeasurementInvalid if the server did not say how often it put a request back for lack of memory."""
    silent = sum(sample.retractions is None for sample in samples)
    if silent:
        raise MeasurementInvalid(f"retractions_reported: of {silent} of {len(samples)} requests the server did not "
                                 "count the retractions: serve with the SGLang that requirements/ name.")


def dispatch_lag_ms(samples: Sequence[Sample]) -> list[float]:
    """Milliseconds by which each request of an open loop left after its schedule."""
    return [(s.sent_s - s.scheduled_s) * MS_PER_S for s in samples if s.scheduled_s is not None]


def require_on_schedule(samples: Sequence[Sample], max_lag_ms: float) -> None:
    """Raise MeasurementInvalid if the requests did not leave when the open loop planned them to."""
    lags = dispatch_lag_ms(samples)
    if len(lags) != len(samples):
        raise MeasurementInvalid(f"on_schedule: {len(samples) - len(lags)} of {len(samples)} requests of an open loop "
                                 "have no schedule: reinstall kvtuner-sglang.")
    early = -min(lags)
    if early > EARLY_MS:
        raise MeasurementInvalid(f"on_schedule: a request left {early:.1f} ms before its schedule, so these were not "
                                 "the arrivals that were drawn: reinstall kvtuner-sglang.")
    late = float(np.percentile(lags, 99))
    if late > max_lag_ms:
        raise MeasurementInvalid(f"on_schedule: requests left up to {late:.1f} ms (p99) after their schedule, over "
                                 f"max_dispatch_lag_ms={max_lag_ms:g}: free the machine that sends them.")


def require_turns(samples: Sequence[Sample], workload: MultiturnLoad) -> None:
    """Raise MeasurementInvalid unless every turn of every conversation was answered."""
    asked = workload.conversations * workload.turns
    if len(samples) != asked:
        raise MeasurementInvalid(f"all_turns: {len(samples)} of {asked} turns were sent.")
