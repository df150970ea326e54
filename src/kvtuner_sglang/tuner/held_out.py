"""Plans on text and prompts that the search never saw: logit KL with its standard error, recall with its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvtuner_sglang.errors import MeasurementInvalid
from kvtuner_sglang.quality.compare import TokenRows, block_mean, compare_logits
from kvtuner_sglang.quality.recall import recall_items
from kvtuner_sglang.quality.transformers_path import answers_greedily, logits, quantized
from kvtuner_sglang.tuner.config import FIRST_COUNTED
from kvtuner_sglang.tuner.menu import Plan
from kvtuner_sglang.tuner.scoring import recipes_of

OVERLAP_TOKENS = 24


@dataclass(frozen=True)
class HeldOut:
    """KL in nats with its standard error, and share of equal first tokens, over `n_tokens` from FIRST_COUNTED on."""

    kl: float
    kl_se: float
    top1_agreement: float
    n_tokens: int


class HeldOutText:
    """Windows of prose and their full-precision logits from FIRST_COUNTED on, kept."""

    def __init__(self, model: Any, windows: Sequence[Sequence[int]]) -> None:
        self.model, self.windows = model, windows
        self.full = [logits(model, window)[FIRST_COUNTED:].clone() for window in windows]

    def score(self, plan: Plan, page_size: int) -> HeldOut:
        with quantized(recipes_of(plan, page_size)):
            rows = TokenRows.joined([
                compare_logits(full, logits(self.model, window)[FIRST_COUNTED:], window[FIRST_COUNTED:],
                               str(self.model.device))
                for full, window in zip(self.full, self.windows, strict=True)
            ])
        kl = block_mean(rows.kl)
        return HeldOut(kl.value, kl.standard_error, float(rows.agree.mean()), kl.n)


class RecallPrompts:
    """Retrieval prompts as token ids, and whether a plan answers them right."""

    def __init__(self, model: Any, tokenizer: Any, count: int, seed: int, batch: int) -> None:
        self.model, self.batch, self.name = model, batch, f"{count} prompts of seed {seed}"
        items = recall_items(count, seed)
        self.prompts = [tokenizer.encode(item.prompt, add_special_tokens=False) for item in items]
        self.answers = [tokenizer.encode(f"{item.prompt} {item.answer}", add_special_tokens=False)[len(prompt):]
                        for item, prompt in zip(items, self.prompts, strict=True)]

    def right(self, plan: Plan | None, page_size: int) -> list[bool]:
        """Prompt by prompt; None is full precision."""
        with quantized(() if plan is None else recipes_of(plan, page_size)):
            return answers_greedily(self.model, self.prompts, self.answers, self.batch)


def require_disjoint(calibration: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]]) -> None:
    """Raise MeasurementInvalid if the two share a run of OVERLAP_TOKENS tokens."""
    def runs(windows: Sequence[Sequence[int]]) -> set[tuple[int, ...]]:
        return {tuple(window[i : i + OVERLAP_TOKENS]) for window in windows
                for i in range(len(window) - OVERLAP_TOKENS + 1)}

    shared = runs(calibration) & runs(held_out)
    if shared:
        raise MeasurementInvalid(f"calibration and held-out text share {len(shared)} runs of {OVERLAP_TOKENS} tokens: "
                                 "choose other texts.")
