"""How far a plan moves a model's logits on calibration text: the real quantizer in the transformers path, and cheap.

What full precision computes is computed once: its log-probabilities, and what enters every layer, so that a plan whose
first layers are not quantized starts at the first that is.  Which positions count is the same for all pages
(config.FIRST_COUNTED).
"""

from collections.abc import Sequence
from typing import Any

import torch

from kvtuner_sglang.quality.recipe import KVRecipe, recipe_of
from kvtuner_sglang.quality.transformers_path import attention_errors, head, layer_inputs, quantized
from kvtuner_sglang.quant import KVFormat
from kvtuner_sglang.tuner.config import FIRST_COUNTED

ROWS_AT_ONCE = 256


def recipes_of(plan: Sequence[KVFormat | None], page_size: int) -> list[KVRecipe | None]:
    """What the transformers path runs for a plan served with pages of `page_size`; None is full precision."""
    return [None if fmt is None else recipe_of(fmt, page_size) for fmt in plan]


class Scorer:
    """One model and windows of one length; `kl` in nats, the mean over `positions`, those from FIRST_COUNTED on."""

    def __init__(self, model: Any, windows: Sequence[Sequence[int]], page_size: int) -> None:
        self.model, self.page_size = model, page_size
        self.windows = [list(window) for window in windows]
        self.ids = torch.tensor(self.windows, device=model.device)
        self.inputs = layer_inputs(model, self.ids)
        self.reference = [head(model, rows).log_softmax(-1) for rows in self._rows(self.inputs[-1])]

    @property
    def layers(self) -> int:
        return len(self.inputs) - 1

    @property
    def positions(self) -> int:
        return sum(len(window) - FIRST_COUNTED for window in self.windows)

    @torch.inference_mode()
    def kl(self, plan: Sequence[KVFormat | None]) -> float:
        """KL(full || quantized) with layer i stored as plan[i]; None leaves a layer in full precision."""
        first = next((i for i, fmt in enumerate(plan) if fmt is not None), None)
        if first is None:
            return 0.0
        with quantized(recipes_of(plan, self.page_size)):
            last = layer_inputs(self.model, self.ids, first, self.inputs[first])[-1]
        total = 0.0
        for p, rows in zip(self.reference, self._rows(last), strict=True):
            q = head(self.model, rows).log_softmax(-1)
            total += float((p.exp() * (p - q)).sum(-1).double().sum())
        return total / self.positions

    def attention_errors(self, fmt: KVFormat) -> list[float]:
        """Relative squared error of each layer's attention output in this format, fed full-precision input."""
        plan = recipes_of([fmt] * self.layers, self.page_size)
        found = attention_errors(self.model, self.windows[0], plan)
        return [found[i] for i in range(self.layers)]

    def _rows(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return hidden[:, FIRST_COUNTED:].flatten(0, 1).split(ROWS_AT_ONCE)
