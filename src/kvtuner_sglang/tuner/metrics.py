"""From the comparison to what the record keeps: one set of figures for every kind of plan."""

from collections.abc import Sequence

from kvtuner_sglang.evidence.assemble import Figures
from kvtuner_sglang.evidence.record import Metric
from kvtuner_sglang.measure.metrics import single
from kvtuner_sglang.quality.compare import share
from kvtuner_sglang.tuner.compare_plans import Compared
from kvtuner_sglang.tuner.config import FIRST_COUNTED
from kvtuner_sglang.tuner.run import Tuned
from kvtuner_sglang.tuner.search import Found

RULES = (
    "calibration and held-out text share no run of 24 tokens",
    f"KL is over positions from {FIRST_COUNTED} on of every window, whatever a format's pages",
    "plans run with the pool's own quantizer and its visibility of pages",
    "the plan has at most tune.bits effective bits, metadata counted",
    "uniform and first/last plans that it is compared with have at most tune.uniform_tolerance_bits more bits than it, "
    "random ones at most as many and up to a quarter of a bit in one layer fewer",
)


def figures(tuned: Tuned) -> Figures:
    """KL, bits and recall of each kind's plan; the warnings say where the tuned one is not better."""
    metrics: dict[str, Metric] = {}
    for one in tuned.compared:
        if one.compared:
            metrics |= _metrics_of(one)
    full = share(tuned.recall_full)
    metrics["recall_full"] = single(full.value, "share", full.n)
    metrics["calibration_kl_nats"] = single(tuned.chosen.kl, "nats", tuned.positions)
    metrics["search_plans"] = single(len(tuned.found.candidates), "1", tuned.found.trials)
    metrics["scores_reused"] = single(tuned.reused, "1", tuned.scores)
    metrics["clusters"] = single(len(tuned.clusters), "1", len(tuned.surviving))
    return Figures(metrics, RULES, (*short_of_plans(tuned.found, tuned.asked), *warnings_of(tuned.compared)))


def _metrics_of(one: Compared) -> dict[str, Metric]:
    score, right = one.score, share(one.right)
    return {
        f"{one.compared}_effective_bits": single(one.plan.effective_bits, "bits", len(one.plan.plan)),
        f"{one.compared}_kl_nats": single(score.kl, "nats", score.n_tokens),
        f"{one.compared}_kl_se_nats": single(score.kl_se, "nats", score.n_tokens),
        f"{one.compared}_top1_agreement": single(score.top1_agreement, "share", score.n_tokens),
        f"{one.compared}_recall": single(right.value, "share", right.n),
        f"{one.compared}_recall_se": single(right.standard_error, "share", right.n),
    }


def short_of_plans(found: Found, asked: int) -> tuple[str, ...]:
    """A warning if the search ended with fewer plans than were asked for."""
    if len(found.candidates) >= asked:
        return ()
    return (f"the search found {len(found.candidates)} of {asked} plans: {found.trials} trials ran out, "
            f"{found.infeasible} of them over the budget and {found.repeated} of plans scored before.",)


def warnings_of(compared: Sequence[Compared]) -> tuple[str, ...]:
    """A warning for every other plan that is no worse than the tuned one on held-out text."""
    tuned = compared[0]
    return tuple(f"the tuned plan's held-out KL {tuned.score.kl:.4f} is not below that of {one.plan.name} "
                 f"({one.compared}, {one.plan.effective_bits:.3f} bits): {one.score.kl:.4f}."
                 for one in compared[1:]
                 if one.compared and one.score.kl <= tuned.score.kl and one.plan.plan != tuned.plan.plan)
