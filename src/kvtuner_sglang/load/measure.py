"""One load workload against one running server that stays the same throughout."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtuner_sglang.config import RunConfig, SeedTests
from kvtuner_sglang.evidence.assemble import Figures
from kvtuner_sglang.evidence.record import Metric, metric_key
from kvtuner_sglang.load import validity as load_validity
from kvtuner_sglang.load.config import CapacityLoad, LoadWorkload, MultiturnLoad, OpenLoad
from kvtuner_sglang.load.figures import Repeats, attainment, latencies, level_metrics, over_repeats
from kvtuner_sglang.load.generator import Generator, load_generator
from kvtuner_sglang.load.plan import Batch, Conversation, Level, Planner, prompt_lengths
from kvtuner_sglang.measure import memory, physics, validity
from kvtuner_sglang.measure.hardware import Floor
from kvtuner_sglang.measure.metrics import summarize
from kvtuner_sglang.measure.prompts import PromptSource
from kvtuner_sglang.measure.target import Server
from kvtuner_sglang.measure.throughput import dispatch_s, wall_s
from kvtuner_sglang.serving import client
from kvtuner_sglang.serving.client import Sample
from kvtuner_sglang.serving.dummy_checkpoint import RANDOM_WEIGHTS, is_dummy

if TYPE_CHECKING:
    from kvtuner_sglang.serving.checkpoint import Checkpoint

Say = Callable[[str], None]


def run_load(cluster: Server, config: RunConfig, checkpoint: "Checkpoint", say: Say,
             keep: Callable[[Sample], None], floor: Floor) -> Figures:
    """Warm up, send every repeat of every level by the workload's cache protocol, and check all of it.

    Every sample goes to `keep` as it ends, also when it does not count.  floor: what this machine needs at least
    (physics.floor_of_run).  Raises MeasurementInvalid naming the broken rule, or RunFailed naming what is gone.
    """
    workload = config.workload
    if isinstance(workload, SeedTests):
        raise TypeError(f"workload {workload.name} is the seed's tests: run_seed_tests measures it")
    validity.require_plain_server(cluster.server_info)
    state = cluster.server_info["kvtuner"]
    planner = Planner(workload, PromptSource(checkpoint.vocab_size, config.seed), state["page_size"])
    folder = config.run_dir / "load"
    with load_generator(cluster.base_url, checkpoint.path, folder, state["ranks"][0]["device"], cluster.abort,
                        keep) as generator:
        load = Load(cluster, config, workload, planner, generator, say, floor)
        metrics, warnings = find_capacity(load, workload) if isinstance(workload, CapacityLoad) else (_levels(load), [])
    cluster.check()
    after = client.server_info(cluster.base_url)
    validity.require_same_server(cluster.server_info, after)
    return Figures(
        metrics=metrics | physics.floor_metrics(floor, ()), kv=memory.kv_record(after["kvtuner"], config),
        memory=memory.device_memory(after["kvtuner"]["ranks"]), rules=load_validity.rules_held(workload),
        warnings=((RANDOM_WEIGHTS,) if is_dummy(checkpoint) else ()) + tuple(warnings),
    )


@dataclass(frozen=True)
class Load:
    """A workload on its way to one server."""

    cluster: Server
    config: RunConfig
    workload: LoadWorkload
    planner: Planner
    generator: Generator
    say: Say
    floor: Floor

    @property
    def levels(self) -> list[Level]:
        if isinstance(self.workload, CapacityLoad | OpenLoad):
            return [Level(rate_per_s=rate) for rate in self.workload.rates_per_s]
        return [Level(concurrency=number) for number in self.workload.concurrency]

    def warm_up(self, level: Level) -> None:
        """As many requests at once, and as long, as `level` will have."""
        at_once = level.concurrency or min(self.workload.requests, self.config.server.max_running_requests)
        warm_ups = self._send(self.planner.warm_up(at_once), Level(concurrency=at_once))
        for tokens in prompt_lengths(self.workload):
            validity.require_warm_up(warm_ups, tokens)

    def repeat(self, level: Level, number: int) -> list[Sample]:
        """One repeat of one level, valid."""
        client.flush_cache(self.cluster.base_url)
        drawn = self.planner.draw(f"{self.workload.kind}_{level.name}_r{number}")
        load_validity.require_unique(drawn.measured, self.workload)
        if drawn.prime:
            validity.require_valid(self._send(drawn.prime, Level(concurrency=1)))
        samples = self._send(drawn.measured, level, self.config.seed + number)
        validity.require_valid(samples)
        load_validity.require_retractions_reported(samples)
        physics.require_above_floor(samples, self.floor)
        self._require_the_load(samples, level)
        self.say(f"{level}, repeat {number + 1} of {self.workload.repeats}: {len(samples)} requests in "
                 f"{wall_s(samples):.1f} s")
        return samples

    def metrics(self, repeats: Repeats, level: Level) -> dict[str, Metric]:
        """The level's metrics; of an open loop also how late requests left, of conversations also each turn's times."""
        together = [sample for samples in repeats for sample in samples]
        found = level_metrics(repeats, self.workload.slo, self.config.dist.ranks, level.at)
        physics.require_tpot_above_floor(found, self.floor)
        if level.rate_per_s is not None:
            found[metric_key("dispatch_lag_ms", **level.at)] = summarize(load_validity.dispatch_lag_ms(together), "ms")
        for turn in range(self.workload.turns if isinstance(self.workload, MultiturnLoad) else 0):
            at = {**level.at, "turn": turn + 1}
            of_turn = [sample for sample in together if sample.request_id.endswith(f"-turn{turn}")]
            found |= latencies(of_turn, at)
            found[metric_key("cached_tokens", **at)] = summarize([s.cached_tokens or 0 for s in of_turn], "tokens")
        return found

    def _send(self, conversations: tuple[Conversation, ...], level: Level, seed: int = 0) -> list[Sample]:
        samples = self.generator.send(Batch(conversations, level, seed, self.config.server.request_timeout_s))
        self.cluster.check()
        return samples

    def _require_the_load(self, samples: list[Sample], level: Level) -> None:
        if isinstance(self.workload, MultiturnLoad):
            load_validity.require_turns(samples, self.workload)
        if isinstance(self.workload, CapacityLoad | OpenLoad):
            load_validity.require_on_schedule(samples, self.workload.max_dispatch_lag_ms)
        elif level.concurrency is not None:
            validity.require_fast_client(dispatch_s(samples, level.concurrency), wall_s(samples), level.concurrency)


def _levels(load: Load) -> dict[str, Metric]:
    """All levels, in turn within each repeat, so that what drifts over time is not one level's alone."""
    for level in load.levels:
        load.warm_up(level)
    repeats: dict[Level, list[list[Sample]]] = {level: [] for level in load.levels}
    for number in range(load.workload.repeats):
        for level in load.levels:
            repeats[level].append(load.repeat(level, number))
    return {name: metric for level in load.levels for name, metric in load.metrics(repeats[level], level).items()}


def find_capacity(load: Load, workload: CapacityLoad) -> tuple[dict[str, Metric], list[str]]:
    """The highest of the rates that meets the SLO, by a bisection a repeat; 0 if none does.

    Also the metrics of every rate tried, which has as many repeats as bisections asked for it.
    """
    rates = workload.rates_per_s
    tried: dict[float, list[list[Sample]]] = {}

    def highest(number: int) -> float:
        def meets(rate: float) -> bool:
            samples = load.repeat(Level(rate_per_s=rate), number)
            tried.setdefault(rate, []).append(samples)
            share = attainment(samples, workload.slo)
            load.say(f"{rate:g} req/s: {share:.0%} of the requests within the SLO, {workload.attainment:.0%} needed")
            return share >= workload.attainment

        return bisect_rates(rates, meets)

    load.warm_up(Level(rate_per_s=rates[0]))
    found = [highest(number) for number in range(workload.repeats)]
    metrics = {"capacity_per_s": over_repeats(found, "req/s")}
    for rate in sorted(tried):
        metrics |= load.metrics(tried[rate], Level(rate_per_s=rate))
    warnings = []
    if none := found.count(0.0):
        warnings.append(f"In {none} of {len(found)} repeats not even the lowest rate, {rates[0]:g} req/s, met the SLO.")
    if best := found.count(rates[-1]):
        warnings.append(f"In {best} of {len(found)} repeats the highest rate of the list, {rates[-1]:g} req/s, met the "
                        "SLO: more may be possible.")
    return metrics, warnings


def bisect_rates(rates: tuple[float, ...], meets: Callable[[float], bool]) -> float:
    """The highest of the ascending `rates` that `meets`, asked log2(len) times; 0.0 if none does."""
    low, high = -1, len(rates)  # rates[low] meets, rates[high] does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if meets(rates[middle]) else (low, middle)
    return rates[low] if low >= 0 else 0.0
