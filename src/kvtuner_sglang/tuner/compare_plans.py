"""The honest check: which plans are compared on held-out text, and which of them stand for their kind."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from kvtuner_sglang.quant.plan_file import ModelIdentity
from kvtuner_sglang.tuner import baselines
from kvtuner_sglang.tuner.baselines import Baseline
from kvtuner_sglang.tuner.config import TuneConfig
from kvtuner_sglang.tuner.held_out import HeldOut, HeldOutText, RecallPrompts
from kvtuner_sglang.tuner.menu import Menu, Plan, pair_name
from kvtuner_sglang.tuner.samples import ComparedSample
from kvtuner_sglang.tuner.score_book import ScoreBook

TUNED, FRONT, ADDITIVE = "tuned", "front", "additive"
UNIFORM_CONF, RANDOM_MEDIAN = "uniform_conf", "random_median"
Say = Callable[[str], None]


@dataclass
class Compared:
    """A plan, its held-out score, and which row of the summary it is ("" if none)."""

    plan: Baseline
    score: HeldOut
    compared: str = ""
    right: tuple[bool, ...] = ()

    def sample(self) -> ComparedSample:
        plan = self.plan
        return ComparedSample("compared", plan.kind, self.compared, plan.name, plan.page_size, plan.effective_bits,
                              self.score.kl, self.score.kl_se, self.score.top1_agreement, self.score.n_tokens,
                              self.right, tuple(map(pair_name, plan.plan)))


def plans_to_compare(tuned: Plan, front: Sequence[Plan], additive: Plan, menu: Menu,
                     surviving: Sequence[tuple[int, ...]], model: ModelIdentity, tune: TuneConfig,
                     seed: int) -> list[Baseline]:
    """The tuned plan first, then the front, the additive model's plan and all baselines at the tuned plan's bits."""
    bits, layers = menu.bits(tuned), len(tuned)
    own = [(TUNED, TUNED, tuned), *((FRONT, f"front {i}", plan) for i, plan in enumerate(front)
                                   if plan not in (tuned, additive)),
           (ADDITIVE, "additive model, layer by layer", additive)]
    return [
        *(Baseline(kind, name, plan, menu.page_size, menu.bits(plan)) for kind, name, plan in own),
        *baselines.uniform_baselines(menu, layers, bits + tune.uniform_tolerance_bits),
        *baselines.first_last_baselines(menu, layers, bits),
        *baselines.random_baselines(menu, surviving, bits, tune.random_plans, seed),
        *baselines.published_baselines(menu, model),
    ]


def compare(plans: Sequence[Baseline], text: HeldOutText, prompts: RecallPrompts, tune: TuneConfig, book: ScoreBook,
            say: Say) -> list[Compared]:
    """All on prose; recall of the front and of those that stand for their kind."""
    found = []
    for number, plan in enumerate(plans):
        score = HeldOut(**book.get(f"held out page {plan.page_size} {_words(plan)}",
                                   partial(_as_dict, text, plan)))
        found.append(Compared(plan, score))
        say(f"held out: {number + 1} of {len(plans)}: {plan.name}, {plan.effective_bits:.3f} bits, KL {score.kl:.4f} "
            f"+- {score.kl_se:.4f}")
    stand_for_their_kind(found, tune.uniform_tolerance_bits)
    for one in found:
        if one.compared or one.plan.kind == FRONT:
            one.right = tuple(book.get(f"recall {prompts.name} page {one.plan.page_size} {_words(one.plan)}",
                                       partial(prompts.right, one.plan.plan, one.plan.page_size)))
            say(f"recall: {one.compared or FRONT}: {sum(one.right)} of {len(one.right)}")
    return found


def stand_for_their_kind(found: Sequence[Compared], tolerance_bits: float) -> None:
    """Mark the rows of the summary: of uniform and first/last plans the best that has no more bits than the tuned one.

    "uniform" is the best of all, "uniform_conf" the best of conf/quant's formats if that is another one.  Of random
    plans it is the one with the median KL.
    """
    bits = found[0].plan.effective_bits
    found[0].compared = TUNED

    def best(name: str, *kinds: str) -> None:
        fitting = [one for one in found if one.plan.kind in kinds and one.plan.effective_bits <= bits + tolerance_bits]
        chosen = min(fitting, key=lambda one: one.score.kl, default=None)
        if chosen is not None and not chosen.compared:
            chosen.compared = name

    best(ADDITIVE, ADDITIVE)
    best(baselines.UNIFORM, baselines.UNIFORM, baselines.UNIFORM_MENU)
    best(UNIFORM_CONF, baselines.UNIFORM)
    best(baselines.FIRST_LAST, baselines.FIRST_LAST)
    best(baselines.PUBLISHED, baselines.PUBLISHED)
    drawn = sorted((one for one in found if one.plan.kind == baselines.RANDOM), key=lambda one: one.score.kl)
    if drawn:
        drawn[(len(drawn) - 1) // 2].compared = RANDOM_MEDIAN


def _as_dict(text: HeldOutText, plan: Baseline) -> dict[str, Any]:
    return asdict(text.score(plan.plan, plan.page_size))


def _words(plan: Baseline) -> str:
    return ", ".join(map(pair_name, plan.plan))
