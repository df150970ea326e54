"""NSGA-II over one choice per cluster: logit KL against effective bits, at most the budget.

The study is a SQLite file.  Every trial draws from a generator seeded by the number of finished trials, and NSGA-II
keeps all else in the study, so that a search that was killed goes on as if it had not been.  The first generation are
plans of the additive model (knapsack.py): half of it at budgets from the full one down to a bit less, half of it at the
full one with every error multiplied by a random number near one.  What exceeds the budget is not scored: it counts as
infeasible by how much it does, with the additive model's error as its KL.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from kvtuner_sglang.tuner import knapsack
from kvtuner_sglang.tuner.clustering import Cluster
from kvtuner_sglang.tuner.menu import Menu, Plan
from kvtuner_sglang.tuner.sensitivity import Sensitivity, summed

BITS_EPSILON = 1e-6
SEED_RANGE_BITS = 1.0  # how far below the budget the additive model is solved, too
JITTER = 0.3  # standard deviation of the logarithm of what errors are multiplied by
TRIALS_PER_CANDIDATE = 5  # how many trials may be infeasible or repeated
ADDITIVE, NSGA2, BY_LAYER = "additive", "nsga2", "additive_by_layer"


@dataclass(frozen=True)
class Candidate:
    """One scored plan: `choices` is a pair of the menu for every cluster.

    origin: a seed of the additive model, bred from such, or the additive model's plan with each layer a cluster.
    """

    choices: tuple[int, ...]
    plan: Plan
    effective_bits: float
    kl: float
    kl_summed: float
    origin: str


@dataclass(frozen=True)
class Found:
    """The candidates in the order of their trials, and how many trials gave none: infeasible, or scored before."""

    candidates: list[Candidate]
    infeasible: int
    repeated: int

    @property
    def trials(self) -> int:
        return len(self.candidates) + self.infeasible + self.repeated


@dataclass(frozen=True)
class Space:
    """What is searched: clusters of a model's layers, their pairs and the budget in mean effective bits."""

    menu: Menu
    clusters: Sequence[Cluster]
    sensitivity: Sensitivity
    budget: float

    def holds(self, candidate: Candidate) -> bool:
        """Whether it is within the budget."""
        return candidate.effective_bits <= self.budget + BITS_EPSILON

    def plan(self, choices: Sequence[int]) -> Plan:
        by_layer = {layer: self.menu.pairs[pair] for cluster, pair in zip(self.clusters, choices, strict=True)
                    for layer in cluster.layers}
        return tuple(by_layer[layer] for layer in range(len(by_layer)))

    def additive(self, budget: float, factors: np.ndarray | float = 1.0) -> tuple[int, ...]:
        """The choices that the additive model prefers within `budget`, its KL multiplied by `factors`."""
        kl = self.sensitivity.kl * factors
        bits = [self.menu.bits([pair]) for pair in self.menu.pairs]
        layers = sum(len(cluster.layers) for cluster in self.clusters)
        costs = [[bits[pair] * len(cluster.layers) for pair in cluster.pairs] for cluster in self.clusters]
        errors = [[float(kl[list(cluster.layers), pair].sum()) for pair in cluster.pairs]
                  for cluster in self.clusters]
        chosen = knapsack.solve(costs, errors, budget * layers, self.menu.units_per_bit)
        return tuple(cluster.pairs[option] for cluster, option in zip(self.clusters, chosen, strict=True))

    def seeds(self, count: int, seed: int) -> list[tuple[int, ...]]:
        """At most `count` different plans of the additive model, the first of them its best within the budget.

        Raises ConfigError if nothing fits the budget.
        """
        fewest = [min(cluster.pairs, key=lambda pair: self.menu.bits([self.menu.pairs[pair]]))
                  for cluster in self.clusters]
        lowest = max(self.budget - SEED_RANGE_BITS, self.menu.bits(self.plan(fewest)))
        rng = np.random.default_rng(seed)
        found = [self.additive(self.budget)]
        if lowest < self.budget:
            found += [self.additive(budget) for budget in np.linspace(self.budget, lowest, (count + 1) // 2)[1:]]
        while len(found) < count:
            found.append(self.additive(self.budget, rng.lognormal(0, JITTER, self.sensitivity.kl.shape)))
        return list(dict.fromkeys(found))


def search(space: Space, kl_of: Callable[[Plan], float], storage: Path, *, population: int, candidates: int, seed: int,
           say: Callable[[str], None]) -> Found:
    """Score until `candidates` different plans within the budget are, or TRIALS_PER_CANDIDATE times as many trials."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(study_name="tune", storage=f"sqlite:///{storage}", load_if_exists=True,
                                directions=["minimize", "minimize"])
    _abandon(study)
    tried = [_candidate(space, trial) for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
    found: dict[tuple[int, ...], Candidate] = {}
    for candidate in filter(space.holds, tried):
        found.setdefault(candidate.choices, candidate)  # who bred it first
    seeds, begun, resumed = space.seeds(population, seed), time.monotonic(), len(found)
    while len(found) < candidates and len(tried) < TRIALS_PER_CANDIDATE * candidates:
        candidate = _next_trial(study, space, kl_of, len(tried), seeds, population, seed)
        tried.append(candidate)
        if space.holds(candidate) and candidate.choices not in found:
            found[candidate.choices] = candidate
            rate = (time.monotonic() - begun) / (len(found) - resumed)
            best = min(found.values(), key=lambda c: c.kl)
            say(f"search: {len(found)} of {candidates} plans, {rate:.1f} s each; best KL {best.kl:.4f} at "
                f"{best.effective_bits:.3f} bits ({best.origin})")
    infeasible = sum(not space.holds(candidate) for candidate in tried)
    return Found(list(found.values()), infeasible, len(tried) - infeasible - len(found))


def _next_trial(study: optuna.Study, space: Space, kl_of: Callable[[Plan], float], number: int,
                seeds: Sequence[tuple[int, ...]], population: int, seed: int) -> Candidate:
    sampler = optuna.samplers.NSGAIISampler(
        population_size=population, seed=int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))
    study.sampler = sampler
    if number < len(seeds):
        study.enqueue_trial({_name(cluster): pair for cluster, pair in zip(space.clusters, seeds[number], strict=True)})
    trial = study.ask()
    generation = sampler.get_trial_generation(study, study.get_trials(deepcopy=False)[trial.number])
    sampler.get_parent_population(study, generation)  # chosen now, read as kept: the two come in different orders
    choices = tuple(trial.suggest_categorical(_name(cluster), cluster.pairs) for cluster in space.clusters)
    plan = space.plan(choices)
    bits, expected = space.menu.bits(plan), summed(space.sensitivity, space.menu, plan)
    excess = max(0.0, bits - space.budget - BITS_EPSILON)
    kl = expected if excess else kl_of(plan)
    origin = ADDITIVE if number < len(seeds) else NSGA2
    trial.set_constraint("excess_bits", excess)
    trial.set_user_attr("origin", origin)
    study.tell(trial, [kl, bits])
    return Candidate(choices, plan, bits, kl, expected, origin)


def _abandon(study: optuna.Study) -> None:
    """Give up the trials of a process that was killed; their numbers are not used again."""
    for _ in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.ask()  # only a running trial can be ended
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)


def _candidate(space: Space, trial: FrozenTrial) -> Candidate:
    choices = tuple(trial.params[_name(cluster)] for cluster in space.clusters)
    plan = space.plan(choices)
    return Candidate(choices, plan, space.menu.bits(plan), trial.values[0], summed(space.sensitivity, space.menu, plan),
                     trial.user_attrs["origin"])


def _name(cluster: Cluster) -> str:
    return "layers " + ",".join(map(str, cluster.layers))


def by_layer(space: Space, kept: Sequence[tuple[int, ...]], kl_of: Callable[[Plan], float]) -> Candidate:
    """The additive model's best plan within the budget if no layers were clustered, scored; kept: pairs by layer."""
    alone = replace(space, clusters=[Cluster((layer,), pairs) for layer, pairs in enumerate(kept)])
    choices = alone.additive(space.budget)
    plan = alone.plan(choices)
    return Candidate(choices, plan, space.menu.bits(plan), kl_of(plan), summed(space.sensitivity, space.menu, plan),
                     BY_LAYER)


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that none of at most as many bits beats, by bits."""
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.effective_bits, c.kl)):
        if not kept or candidate.kl < kept[-1].kl:
            kept.append(candidate)
    return kept
