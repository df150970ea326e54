"""Which pairs a layer may keep: those that no pair of at most as many bits beats."""

from collections.abc import Sequence

import numpy as np


def pareto(bits: Sequence[float], errors: Sequence[float]) -> list[int]:
    """Indices, ascending, of the points that no other beats in one of both without losing in the other.

    Of equal points the first is kept.
    """
    kept = []
    for i, (b, e) in enumerate(zip(bits, errors, strict=True)):
        beaten = any((b2 <= b and e2 <= e) and (b2 < b or e2 < e or j < i)
                     for j, (b2, e2) in enumerate(zip(bits, errors, strict=True)) if j != i)
        if not beaten:
            kept.append(i)
    return kept


def surviving(bits: Sequence[float], error: np.ndarray) -> list[tuple[int, ...]]:
    """For every layer the pairs on its Pareto front of bits against `error`, (layers, pairs)."""
    return [tuple(pareto(bits, own)) for own in error]
