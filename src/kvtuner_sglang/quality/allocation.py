"""Bits per layer, keys and values apart, from how much each hurts alone: the most KL saved per bit first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvtuner_sglang.quality.recipe import KVRecipe, TensorRecipe, effective_bits

KEY, VALUE = "key", "value"


@dataclass(frozen=True)
class Ladder:
    """What may be chosen for the keys, and for the values, of a layer: from fewest bits to most."""

    key: tuple[TensorRecipe, ...]
    value: tuple[TensorRecipe, ...]

    def steps(self, tensor: str) -> tuple[TensorRecipe, ...]:
        return self.key if tensor == KEY else self.value


Sensitivities = dict[tuple[int, str], list[float]]
FULL = TensorRecipe(16)


def sensitivities(ladder: Ladder, layers: int, kl_of: Callable[[Sequence[KVRecipe | None]], float]) -> Sensitivities:
    """(layer, "key" | "value") -> KL with this tensor alone at each step of its ladder."""
    found: Sensitivities = {}
    for layer in range(layers):
        for tensor in (KEY, VALUE):
            found[layer, tensor] = []
            for step in ladder.steps(tensor):
                alone = KVRecipe(step, FULL) if tensor == KEY else KVRecipe(FULL, step)
                found[layer, tensor].append(kl_of([alone if i == layer else None for i in range(layers)]))
    return found


def allocate(ladder: Ladder, found: Sensitivities, layers: int, head_dim: int, budget_bits: float) -> list[KVRecipe]:
    """A plan of at most `budget_bits` effective bits: starts at the fewest everywhere, then climbs greedily.

    Takes the KL of several tensors as the sum of theirs alone, which holds while all are small.
    """
    at = dict.fromkeys(found, 0)

    def plan() -> list[KVRecipe]:
        return [KVRecipe(ladder.key[at[i, KEY]], ladder.value[at[i, VALUE]]) for i in range(layers)]

    blocked: set[tuple[int, str]] = set()
    while candidates := [t for t in at if t not in blocked and at[t] + 1 < len(ladder.steps(t[1]))]:
        best = max(candidates, key=lambda t: _gain_per_bit(ladder, found, t, at[t], head_dim))
        at[best] += 1
        if effective_bits(plan(), head_dim) > budget_bits + 1e-9:
            at[best] -= 1
            blocked.add(best)
    return plan()


def _gain_per_bit(ladder: Ladder, found: Sensitivities, tensor: tuple[int, str], step: int, head_dim: int) -> float:
    steps = ladder.steps(tensor[1])
    bits = steps[step + 1].effective_bits(head_dim) - steps[step].effective_bits(head_dim)
    return (found[tensor][step] - found[tensor][step + 1]) / bits
