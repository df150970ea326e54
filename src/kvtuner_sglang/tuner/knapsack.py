"""The best choices if errors add up: an exact multiple-choice knapsack.

Each item takes one of its options, of a cost in bits and an error; the sum of errors is least among all choices whose
costs sum to at most the budget.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from kvtuner_sglang.errors import ConfigError


def solve(costs: Sequence[Sequence[float]], errors: Sequence[Sequence[float]], budget: float,
          units_per_bit: int) -> list[int]:
    """The option of every item; raises ConfigError if even the cheapest ones exceed the budget.

    units_per_bit: of a unit of which every cost is a whole multiple (Menu.units_per_bit).
    """
    units = [[round(cost * units_per_bit) for cost in item] for item in costs]
    shared = math.gcd(*itertools.chain.from_iterable(units))
    units = [[cost // shared for cost in item] for item in units]
    capacity = int(budget * units_per_bit + 1e-6) // shared
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
