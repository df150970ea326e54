"""From two engines' answers to what the record keeps: metrics with their n, samples, and the rules that held."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtuner_sglang.evidence.assemble import Figures
from kvtuner_sglang.evidence.record import KVRecord, Metric
from kvtuner_sglang.measure.metrics import single, summarize
from kvtuner_sglang.quality.compare import Mean, TokenRows, block_mean, paired_difference, share
from kvtuner_sglang.quality.engine_run import as_lists
from kvtuner_sglang.quality.measure import Quality

RULES = (
    "both engines were asked the same prompts",
    "no prose token came from the prefix cache",
    "logits are complete and in order: row i gives token i+1 the log-probability that the engine reports for it",
    "every logit is finite",
    "the engine reports the plan that was asked for",
)


@dataclass(frozen=True)
class ProseSample:
    """One window, value by value; see compare.TokenRows."""

    kind: str
    window: int
    kl: list[float | None]
    agree: list[float | None]
    nll_full: list[float | None]
    nll: list[float | None]


@dataclass(frozen=True)
class ItemSample:
    """One prompt: its right answer, the quantized engine's completion and both verdicts."""

    kind: str
    item_id: str
    answer: str
    text: str
    right: bool
    right_full: bool


def figures(quality: Quality, kv: KVRecord) -> Figures:
    metrics = prose_metrics(quality.rows)
    for name, right in quality.right.items():
        metrics |= item_metrics(name, right, quality.right_full[name])
    return Figures(metrics, RULES, _warnings(metrics), kv)


def prose_metrics(rows: Sequence[TokenRows]) -> dict[str, Metric]:
    """KL and agreement over all tokens, negative log-likelihood over those that one follows, in both precisions."""
    joined = TokenRows.joined(rows)
    kl = block_mean(joined.kl)
    metrics = {
        "kl_nats": summarize(joined.kl.tolist(), "nats"),
        "top1_agreement": summarize(joined.agree.tolist(), "share"),
        "perplexity": single(joined.perplexity, "1", kl.n),
        "perplexity_full": single(joined.perplexity_full, "1", kl.n),
    }
    if np.isfinite(kl.standard_error):
        metrics["kl_se_nats"] = single(kl.standard_error, "nats", kl.n)
    return metrics


def item_metrics(name: str, right: Sequence[bool], right_full: Sequence[bool]) -> dict[str, Metric]:
    """Shares of right answers with binomial errors, and their paired difference with its 95 % interval."""
    difference = paired_difference(right, right_full)
    low, high = difference.interval95
    return {
        name: summarize([float(x) for x in right], "share"),
        f"{name}_se": single(share(right).standard_error, "share", len(right)),
        f"{name}_full": summarize([float(x) for x in right_full], "share"),
        f"{name}_difference": _mean(difference),
        f"{name}_difference_low": single(low, "share", difference.n),
        f"{name}_difference_high": single(high, "share", difference.n),
    }


def samples(quality: Quality) -> Iterator[Any]:
    """Everything that was measured, one dataclass instance a line of the samples file."""
    for window, rows in enumerate(quality.rows):
        yield ProseSample("prose", window, **as_lists(rows))
    for name, items in quality.prompts.items.items():
        columns = zip(items, quality.texts[name], quality.right[name], quality.right_full[name], strict=True)
        for item, text, right, right_full in columns:
            yield ItemSample(name, item.item_id, item.answer, text, right, right_full)


def describe(metrics: dict[str, Metric], say: Callable[[str], None]) -> None:
    """The figures as a few lines for the console."""
    kl_se = metrics.get("kl_se_nats")
    error = f" +- {kl_se.mean:.4f}" if kl_se else ""
    say(f"  KL {metrics['kl_nats'].mean:.4f}{error} nats over {metrics['kl_nats'].n} tokens, top-1 agreement "
        f"{metrics['top1_agreement'].mean:.3f}, perplexity {metrics['perplexity'].mean:.2f} "
        f"(full precision {metrics['perplexity_full'].mean:.2f})")
    for name in ("recall", "arithmetic"):
        if name in metrics:
            say(f"  {name} {metrics[name].mean:.3f} (full precision {metrics[f'{name}_full'].mean:.3f}); difference "
                f"{metrics[f'{name}_difference'].mean:+.3f}, 95 % from {metrics[f'{name}_difference_low'].mean:+.3f} "
                f"to {metrics[f'{name}_difference_high'].mean:+.3f}, n = {metrics[name].n}")


def _warnings(metrics: dict[str, Metric]) -> tuple[str, ...]:
    if "recall_full" in metrics and metrics["recall_full"].mean < 0.5:
        return (f"full precision itself recalls only {metrics['recall_full'].mean:.2f}: a difference says little.",)
    return ()


def _mean(mean: Mean) -> Metric:
    return single(mean.value, "share", mean.n)
