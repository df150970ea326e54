"""The seed report's three tests, in its order, against one running server that stays the same throughout."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvtuner_sglang.config import RunConfig, SeedTests
from kvtuner_sglang.evidence.assemble import Figures
from kvtuner_sglang.measure import memory, physics, validity
from kvtuner_sglang.measure.hardware import Floor
from kvtuner_sglang.measure.prompts import PromptSource
from kvtuner_sglang.measure.target import Server, Target
from kvtuner_sglang.measure.throughput import measure_throughput
from kvtuner_sglang.measure.ttft import measure_ttft
from kvtuner_sglang.serving import client
from kvtuner_sglang.serving.client import Sample
from kvtuner_sglang.serving.dummy_checkpoint import RANDOM_WEIGHTS, is_dummy

if TYPE_CHECKING:
    from kvtuner_sglang.serving.checkpoint import Checkpoint


def run_seed_tests(cluster: Server, config: RunConfig, checkpoint: "Checkpoint", say: Callable[[str], None],
                   keep: Callable[[Sample], None], floor: Floor) -> Figures:
    """Time to first token, throughput and latency, memory.

    Every request's sample goes to `keep` as it ends (evidence.samples.SampleLog.append), also when it does not count.
    floor: what this machine needs at least (physics.floor_of_run).
    Raises MeasurementInvalid naming the broken rule, or RunFailed naming the rank that is gone.
    """
    tests = config.workload
    if not isinstance(tests, SeedTests):
        raise TypeError(f"workload {tests.name} is a load: run_load measures it")
    load = tests.throughput
    validity.require_enough_requests(load.requests_at(max(load.concurrency)), load.concurrency)
    validity.require_plain_server(cluster.server_info)
    taken: list[Sample] = []

    def keep_here_too(sample: Sample) -> None:
        keep(sample)
        taken.append(sample)

    target = Target(cluster, config.server.request_timeout_s, keep_here_too)
    prompts = PromptSource(checkpoint.vocab_size, config.seed)
    metrics = measure_ttft(target, tests.ttft, prompts, say)
    physics.require_above_floor(taken, floor)
    alone = list(taken)
    metrics |= measure_throughput(target, load, prompts, say)
    physics.require_above_floor(taken, floor)
    physics.require_tpot_above_floor(metrics, floor)
    physics.require_work_takes_time(alone, taken[len(alone) :], floor)
    metrics |= physics.floor_metrics(floor, tests.ttft.prompt_tokens)
    cluster.check()
    after = client.server_info(cluster.base_url)
    validity.require_same_server(cluster.server_info, after)
    p50_ms = {tokens: metrics[f"ttft_ms/prompt_tokens={tokens}"].p50 for tokens in tests.ttft.prompt_tokens}
    random_weights = (RANDOM_WEIGHTS,) if is_dummy(checkpoint) else ()
    return Figures(
        metrics=metrics,
        kv=memory.kv_record(after["kvtuner"], config),
        memory=memory.device_memory(after["kvtuner"]["ranks"]),
        rules=validity.rules_held(),
        warnings=(*random_weights, *validity.monotone_warnings(p50_ms)),
    )
