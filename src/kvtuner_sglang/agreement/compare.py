"""How far the answers of two servers are apart, against the noise floor of the format.

Four-bit codes amplify float noise: whatever changes the shape of a matrix product moves log-probabilities.  How much is
measured, not chosen: the floor is what relative noise of the size of rounding does on keys and values of one rank.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from kvtuner_sglang.agreement.answers import Answer
from kvtuner_sglang.evidence.record import Metric

# float32: far above its rounding, yet below all that four bits cost.  The others round by up to 2^-9 (2^-12) of a
# value, 2^-10 (2^-13) in the mean square.
NOISE = {"float32": 1e-6, "bfloat16": 2.0**-10, "float16": 2.0**-13}
FLOORS = 2  # floors that a layout may be away: its own noise, and that of the rank it is compared with
MIN_SHARE = 1 / 4  # of all tokens that must be left to compare


def moved(some: Sequence[Answer], others: Sequence[Answer]) -> np.ndarray:
    """|difference| of log-probabilities of all tokens up to which both texts are equal."""
    differences: list[float] = []
    for a, b in zip(some, others, strict=True):
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a.tokens, b.tokens, strict=True))
        pairs = zip(a.log_probabilities, b.log_probabilities, strict=True)
        differences += [abs(x - y) for (x, y), _ in zip(pairs, same, strict=False)]
    return np.array(differences)


def enough(differences: np.ndarray, some: Sequence[Answer]) -> bool:
    """Whether more than a quarter of all tokens are left to compare."""
    return len(differences) > MIN_SHARE * sum(len(a.tokens) for a in some)


def texts_equal(some: Sequence[Answer], others: Sequence[Answer]) -> int:
    return sum(a.tokens == b.tokens for a, b in zip(some, others, strict=True))


def within(difference: Metric, floor: Metric | None, equal: int, prompts: int) -> bool:
    """Whether mean and maximum stay within twice the floor's; without a floor, whether all texts are equal."""
    if floor is None:
        return equal == prompts
    return difference.mean <= FLOORS * floor.mean and difference.max <= FLOORS * floor.max
