"""The best choices if errors add up: an exact multiple-choice knapsack.

Each item takes one of its options, of a cost in bits and an error; the sum of errors is least among all choices whose
costs sum to at most the budget.
"""

from collections.abc import Sequence

import numpy as np

from kvtuner_sglang.errors import ConfigError

UNITS_PER_BIT = 64  # effective bits of head dimensions and pages up to 128 are whole multiples of it


def solve(costs: Sequence[Sequence[float]], errors: Sequence[Sequence[float]], budget: float) -> list[int]:
    """The option of every item; raises ConfigError if even the cheapest ones exceed the budget."""
    units = [[round(cost * UNITS_PER_BIT) for cost in item] for item in costs]
    capacity = int(budget * UNITS_PER_BIT + 1e-6)
    if sum(min(item) for item in units) > capacity:
        raise ConfigError(f"no choice has so few bits as {budget:g} in all: raise tune.bits or offer formats of fewer "
                          "bits (tune.keys, tune.values).")
    best = np.zeros(capacity + 1)  # least error of the items so far, by what may be spent on them
    taken = []
    for item, error in zip(units, errors, strict=True):
        tried = np.full((len(item), capacity + 1), np.inf)
        for option, (cost, loss) in enumerate(zip(item, error, strict=True)):
            if cost <= capacity:
                tried[option, cost:] = best[: capacity + 1 - cost] + loss
        taken.append(tried.argmin(0))
        best = tried.min(0)
    left, choice = capacity, []
    for item, option in zip(reversed(units), reversed(taken), strict=True):
        choice.append(int(option[left]))
        left -= item[choice[-1]]
    return choice[::-1]
