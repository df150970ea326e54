"""How much each layer loses in each format, alone.

Two measures of every pair of a key and a value format: the relative squared error of the layer's attention output, by
which KVTuner prunes, and the logit KL of the whole model with only this layer quantized.  The second decides here: an
error of keys may be large and move the logits little, or the other way round.

The KL is measured for every key format beside the best values and for every value format beside the best keys; of the
other pairs it is the sum of the two less what the best pair costs:
KL(k, v) = KL(k, best) + KL(best, v) - KL(best, best).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from kvtuner_sglang.quant import KVFormat
from kvtuner_sglang.tuner.menu import Menu, pair_name
from kvtuner_sglang.tuner.score_book import ScoreBook
from kvtuner_sglang.tuner.scoring import Scorer

Say = Callable[[str], None]


@dataclass(frozen=True)
class Sensitivity:
    """kl and attention_error: (layers, pairs) float64, in the order of menu.pairs."""

    kl: np.ndarray
    attention_error: np.ndarray


def measure(scorer: Scorer, menu: Menu, book: ScoreBook, say: Say) -> Sensitivity:
    """Measures what the book does not know yet; says how far it is."""
    errors = np.array([book.get(f"attention {pair_name(fmt)}", partial(scorer.attention_errors, fmt))
                       for fmt in menu.pairs]).T
    begun, kls = time.monotonic(), []

    def kl_of(layer: int, fmt: KVFormat) -> float:
        return book.get(f"layer {layer} {pair_name(fmt)}", lambda: scorer.kl(alone(fmt, layer, scorer.layers)))

    for layer in range(scorer.layers):
        kls.append(combined(menu, partial(kl_of, layer)))
        say(f"sensitivity: layer {layer + 1} of {scorer.layers}, {time.monotonic() - begun:.0f} s")
    return Sensitivity(np.array(kls), errors)


def alone(fmt: KVFormat, layer: int, layers: int) -> list[KVFormat | None]:
    """The plan that quantizes one layer."""
    return [fmt if i == layer else None for i in range(layers)]


def combined(menu: Menu, kl_of: Callable[[KVFormat], float]) -> list[float]:
    """The KL of every pair of one layer, from those with the most bits on one side."""
    best_key = max(menu.keys, key=lambda fmt: (fmt.bits, not fmt.symmetric))
    best_value = max(menu.values, key=lambda fmt: (fmt.bits, not fmt.symmetric))
    best = kl_of(KVFormat(best_key, best_value))
    keys = [kl_of(KVFormat(key, best_value)) for key in menu.keys]
    values = [kl_of(KVFormat(best_key, value)) for value in menu.values]
    return [max(key + value - best, 0.0) for key in keys for value in values]


def summed(sensitivity: Sensitivity, menu: Menu, plan: Sequence[KVFormat]) -> float:
    """The KL of a plan if layers did not interact: the sum over its layers."""
    return float(sum(sensitivity.kl[i, menu.pairs.index(fmt)] for i, fmt in enumerate(plan)))
