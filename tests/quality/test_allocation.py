"""Bits go where they save most, and never over the budget."""

import pytest

from kvtuner_sglang.quality.allocation import KEY, VALUE, Ladder, allocate, sensitivities
from kvtuner_sglang.quality.recipe import TensorRecipe, effective_bits

LADDER = Ladder(tuple(TensorRecipe(b) for b in (2, 4, 8)), tuple(TensorRecipe(b) for b in (2, 4)))


def test_sensitivities_quantize_one_tensor_at_a_time():
    seen = []

    def kl_of(plan):
        quantized = [(i, r) for i, r in enumerate(plan) if r is not None]
        assert len(quantized) == 1
        layer, recipe = quantized[0]
        assert (recipe.key.quantized, recipe.value.quantized) in ((True, False), (False, True))
        seen.append(layer)
        return 1.0 / (recipe.key.bits if recipe.key.quantized else recipe.value.bits)

    found = sensitivities(LADDER, 2, kl_of)
    assert found == {(i, t): [0.5, 0.25, 0.125][: 3 if t == KEY else 2] for i in (0, 1) for t in (KEY, VALUE)}
    assert seen == [0] * 5 + [1] * 5


@pytest.mark.parametrize("budget", [2.5, 3.0, 3.5, 4.2, 5.0, 9.0])
def test_the_budget_holds_and_is_used(budget):
    found = {(i, t): [0.4 / (i + 1), 0.05 / (i + 1), 0.01][: 3 if t == KEY else 2] for i in range(4)
             for t in (KEY, VALUE)}
    plan = allocate(LADDER, found, 4, 64, budget)
    bits = effective_bits(plan, 64)
    assert bits <= budget
    most = effective_bits(allocate(LADDER, found, 4, 64, 99), 64)
    smallest_step = 2 / 8  # two more bits in one of eight tensors
    assert bits == most or bits > budget - 2 * smallest_step


def test_the_most_sensitive_tensor_is_served_first():
    found = {(i, t): [0.01, 0.005, 0.0][: 3 if t == KEY else 2] for i in range(3) for t in (KEY, VALUE)}
    found[1, KEY] = [5.0, 0.1, 0.0]
    plan = allocate(LADDER, found, 3, 64, 2.9)
    assert [r.key.bits for r in plan] == [2, 4, 2]
    assert [r.value.bits for r in plan] == [2, 2, 2]
