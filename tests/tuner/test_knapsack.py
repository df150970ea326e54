"""The solver against trying everything, and plans of the additive model."""

import itertools
import random

import pytest

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.tuner.knapsack import solve
from kvtuner_sglang.tuner.menu import Menu


@pytest.mark.parametrize("seed", range(20))
def test_the_best_of_all_choices(seed):
    rng = random.Random(seed)
    costs = [[rng.randrange(16, 64) / 8 for _ in range(rng.randint(1, 4))] for _ in range(6)]
    errors = [[rng.random() for _ in item] for item in costs]
    budget = rng.uniform(sum(map(min, costs)), sum(map(max, costs)))

    def total(values, choice):
        return sum(item[option] for item, option in zip(values, choice, strict=True))

    every = [choice for choice in itertools.product(*(range(len(item)) for item in costs))
             if total(costs, choice) <= budget]
    best = min(total(errors, choice) for choice in every)
    found = solve(costs, errors, budget, 8)
    assert total(costs, found) <= budget
    assert total(errors, found) == pytest.approx(best)


def test_a_budget_that_is_met_exactly_is_not_missed_by_rounding():
    assert solve([[4.25 + 2.25, 8.25 + 2.25]] * 30, [[1.0, 0.0]] * 30, 30 * 6.5, 64) == [0] * 30
    assert solve([[6.5, 8.5]] * 30, [[1.0, 0.0]] * 30, 30 * 6.5 + 2, 64).count(1) == 1


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128])
def test_bits_of_every_head_size_are_counted_exactly(head_dim):
    """At a budget that three of four layers' second pair meets exactly, and at just less."""
    menu = Menu(("2", "4s", "4", "8"), ("2s", "4s", "8s"), head_dim, 128)
    costs = [menu.bits([menu.pairs[0]]), menu.bits([menu.pairs[-1]])]
    budget = costs[0] + 3 * costs[1]
    chosen = [solve([costs] * 4, [[1.0, 0.0]] * 4, bits, menu.units_per_bit) for bits in (budget, budget - 1e-3)]
    assert [choice.count(1) for choice in chosen] == [3, 2]


def test_nothing_fits():
    with pytest.raises(ConfigError, match=r"tune.bits"):
        solve([[4.0], [2.0, 8.0]], [[0.1], [0.2, 0.0]], 5.9, 64)
