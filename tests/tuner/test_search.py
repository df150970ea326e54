"""The search on a made-up model whose layers' errors add up, so that the best plan is known."""

import itertools

import numpy as np
import optuna
import pytest

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.tuner.clustering import Cluster
from kvtuner_sglang.tuner.menu import Menu
from kvtuner_sglang.tuner.search import Space, by_layer, front, search
from kvtuner_sglang.tuner.sensitivity import Sensitivity, summed

LAYERS = 5
MENU = Menu(("2", "4", "8"), ("2s", "4s"), 64, 128)
ALL_PAIRS = tuple(range(len(MENU.pairs)))


class KilledError(Exception):
    """Stands for the end of the process."""


def made_up_space(budget: float, clusters=None, layers=LAYERS) -> Space:
    rng = np.random.default_rng(3)
    bits = np.array([MENU.bits([pair]) for pair in MENU.pairs])
    kl = rng.lognormal(-4, 1.5, (layers, 1)) * 2.0 ** (-1.5 * bits)
    return Space(MENU, clusters or [Cluster((i,), ALL_PAIRS) for i in range(layers)], Sensitivity(kl, kl), budget)


def run(space, tmp_path, candidates=14, kl_of=None, seed=0):
    kl_of = kl_of or (lambda plan: summed(space.sensitivity, MENU, plan))
    return search_all(space, kl_of, tmp_path, candidates, seed).candidates


def search_all(space, kl_of, tmp_path, candidates, seed=0, population=4):
    return search(space, kl_of, tmp_path / "study.db", population=population, candidates=candidates, seed=seed,
                  say=lambda line: None)


def test_the_additive_plan_is_the_best_of_a_model_that_is_additive(tmp_path):
    space = made_up_space(4.0)
    found = run(space, tmp_path)
    assert len(found) == 14
    assert all(candidate.effective_bits <= 4.0 + 1e-6 for candidate in found)
    assert min(found, key=lambda c: c.kl) == found[0]
    assert {c.origin for c in found} == {"additive", "nsga2"}
    assert found[0].kl == pytest.approx(summed(space.sensitivity, MENU, space.plan(space.additive(4.0))))


def test_nsga2_gets_past_the_seeds_where_layers_interact(tmp_path):
    """A pair of layers that the additive model keeps low costs much more together."""
    space = made_up_space(4.0)
    low = [i for i, fmt in enumerate(space.plan(space.additive(4.0))) if MENU.bits([fmt]) < 4.0]
    assert len(low) >= 2

    def kl_of(plan):
        both = all(MENU.bits([plan[i]]) < 4.0 for i in low[:2])
        return summed(space.sensitivity, MENU, plan) + (1.0 if both else 0.0)

    found = run(space, tmp_path, candidates=30, kl_of=kl_of)
    assert min(c.kl for c in found if c.origin == "additive") > 1.0
    assert min(found, key=lambda c: c.kl).origin == "nsga2"


def test_nsga2_breeds_plans_from_earlier_ones(tmp_path):
    """In a space too wide to hit by chance: a child takes each choice from one of two parents, but for mutations."""
    layers, population = 12, 8
    space = made_up_space(4.0, layers=layers)
    search_all(space, lambda plan: summed(space.sensitivity, MENU, plan), tmp_path, 24, population=population)
    trials = optuna.load_study(study_name="tune", storage=f"sqlite:///{tmp_path / 'study.db'}").get_trials()
    generation = [trial.system_attrs.get("NSGAIISampler:generation") for trial in trials]
    assert None not in generation
    first = [tuple(trial.params.values()) for trial, number in zip(trials, generation, strict=True) if number == 0]
    bred = [tuple(trial.params.values()) for trial, number in zip(trials, generation, strict=True) if number == 1]
    assert len(first) == len(bred) == population

    def inherited(child):
        return max(sum(gene in pair for gene, *pair in zip(child, *parents, strict=True))
                   for parents in itertools.combinations(first, 2))

    assert np.mean([inherited(child) for child in bred]) >= 0.8 * layers


def test_a_search_says_how_many_trials_gave_no_plan(tmp_path):
    """There are 4 plans of two layers with two pairs, of which one exceeds the budget: 40 trials find no more."""
    two = (ALL_PAIRS[0], ALL_PAIRS[-1])
    space = made_up_space(4.5, [Cluster((i,), two) for i in range(2)], layers=2)
    kl_of = lambda plan: summed(space.sensitivity, MENU, plan)  # noqa: E731
    for _ in range(2):  # again from the finished study
        found = search_all(space, kl_of, tmp_path, 8)
        assert len(found.candidates) == 3
        assert found.trials == 40
        assert min(found.infeasible, found.repeated) > 0
    enough = search_all(space, kl_of, tmp_path, len(found.candidates))
    assert enough.candidates == found.candidates


def test_the_additive_plan_without_clusters_is_at_least_as_good_where_layers_add_up(tmp_path):
    clusters = [Cluster((0, 1, 2), ALL_PAIRS), Cluster((3, 4), ALL_PAIRS)]
    space = made_up_space(4.0, clusters)
    kl_of = lambda plan: summed(space.sensitivity, MENU, plan)  # noqa: E731
    alone = by_layer(space, [ALL_PAIRS] * LAYERS, kl_of)
    assert alone.effective_bits <= 4.0 + 1e-6
    assert alone.kl < min(c.kl for c in run(space, tmp_path, kl_of=kl_of))


def test_a_killed_search_goes_on_as_if_it_had_not_been(tmp_path):
    space = made_up_space(4.0)
    (tmp_path / "whole").mkdir()
    whole = run(space, tmp_path / "whole")
    scored = []

    def killed_at(number):
        def kl_of(plan):
            if len(scored) == number:
                raise KilledError
            scored.append(plan)
            return summed(space.sensitivity, MENU, plan)
        return kl_of

    for number in (3, 8, 9):
        with pytest.raises(KilledError):
            run(space, tmp_path, kl_of=killed_at(number))
    assert run(space, tmp_path, kl_of=killed_at(-1)) == whole
    assert run(space, tmp_path, kl_of=killed_at(len(scored))) == whole  # finished: nothing is scored again


def test_seeds_are_fixed_and_matter(tmp_path):
    space = made_up_space(4.0)
    results = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        results.append(run(space, tmp_path / name, seed=seed))
    assert results[0] == results[1] != results[2]


def test_layers_of_a_cluster_choose_together(tmp_path):
    clusters = [Cluster((0, 3), ALL_PAIRS), *(Cluster((i,), ALL_PAIRS[:2]) for i in (1, 2, 4))]
    for candidate in run(made_up_space(3.5, clusters), tmp_path, candidates=8):
        assert candidate.plan[0] == candidate.plan[3]
        assert {candidate.plan[i] for i in (1, 2, 4)} <= set(MENU.pairs[:2])


def test_a_budget_below_everything_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"tune.bits"):
        run(made_up_space(2.0), tmp_path)


def test_the_front_has_no_candidate_that_another_beats(tmp_path):
    found = run(made_up_space(4.5), tmp_path)
    best = front(found)
    assert best[-1].kl == min(c.kl for c in found)
    for a, b in itertools.pairwise(best):
        assert a.effective_bits < b.effective_bits
        assert a.kl > b.kl
    assert all(any(b.effective_bits <= c.effective_bits and b.kl <= c.kl for b in best) for c in found)
