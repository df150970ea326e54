"""report.md of a tuning, from its record and samples alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvtuner_sglang.evidence.record import RunRecord, load_record, write_atomically
from kvtuner_sglang.evidence.samples import read_samples
from kvtuner_sglang.evidence.sweep import markdown_table
from kvtuner_sglang.quality.compare import share
from kvtuner_sglang.quant.plan_file import layer_text
from kvtuner_sglang.tuner.config import FIRST_COUNTED
from kvtuner_sglang.tuner.figures import ORIGINS, of_kind

REPORT_FILE = "report.md"
BOUNDS = {"uniform": 0.5, "uniform_conf": 0.5, "first_last": 1.0, "random_median": 1.0}  # of the tuned plan's KL
KINDS = {
    "tuned": "tuned plan", "additive": "additive model's plan, layer by layer", "uniform": "best uniform format",
    "uniform_conf": "best uniform format of conf/quant", "first_last": "best plan with first and last layers high",
    "random_median": "median random plan", "published": "best published plan",
}


def write_report(run_dir: Path) -> Path:
    path = run_dir / REPORT_FILE
    write_atomically(path, render(load_record(run_dir), read_samples(run_dir)))
    return path


def render(record: RunRecord, samples: Sequence[dict[str, Any]]) -> str:
    tune, model = record.config["tune"], record.config["model"]["name"]
    compared = of_kind(samples, "compared")
    parts = [
        f"# Bits per layer for {model} within {tune['bits']:g} effective bits",
        f"Commit {record.environment.git_sha}{' (with changes)' if record.environment.git_dirty else ''}, "
        f"{record.environment.machine}, {record.started} to {record.ended}. Bits count all metadata; the plan is "
        f"served with pages of {tune['page_size']} tokens.",
        "## Held out", _held_out(compared, of_kind(samples, "full_precision")[0]["right"]),
        "\n".join(f"- {line}" for line in verdicts(compared)),
        f"KL on chapters 3 and 4 of Persuasion, over positions from {FIRST_COUNTED} on of every window as on the "
        "search's own text, +- one standard error over blocks of 100 tokens; recall of 4-digit "
        "codes with its 95 % interval. The search saw chapter 1 alone, and no retrieval prompt.",
        "![Held-out KL over bits](pareto.png)",
        "## The plan", _plan(compared[0]["plan"]),
        "## Search", _search(of_kind(samples, "candidate"), of_kind(samples, "search")[0], tune),
        "![Additive model](additive.png)",
        "## Sensitivity, pruning, clusters", _layers(of_kind(samples, "layer")), "![Sensitivity](sensitivity.png)",
        "## All plans compared", _all(compared),
    ]
    if record.warnings:
        parts += ["## Warnings", "\n".join(f"- {warning}" for warning in record.warnings)]
    return "\n\n".join(parts) + "\n"


def verdicts(compared: Sequence[dict[str, Any]]) -> list[str]:
    """One line for every kind of plan: the tuned plan's KL over its own, and whether that is what was asked for."""
    tuned = compared[0]["kl"]
    lines = []
    for row in compared[1:]:
        if row["compared"]:
            ratio, bound = tuned / row["kl"], BOUNDS.get(row["compared"])
            verdict = "" if bound is None else f" ({bound:g} or less: {'held' if ratio <= bound else 'missed'})"
            lines.append(f"KL of the tuned plan over that of the {KINDS[row['compared']]} "
                         f"({row['effective_bits']:.3f} bits): {ratio:.3f}{verdict}")
    return lines


def _held_out(compared: Sequence[dict[str, Any]], full: Sequence[bool]) -> str:
    rows = [(KINDS[row["compared"]], row["name"], f"{row['effective_bits']:.3f}",
             f"{row['kl']:.4f} +- {row['kl_se']:.4f}", f"{row['top1_agreement']:.3f}", _recall(row["right"]))
            for row in compared if row["compared"]]
    rows.append(("full precision", "", "16", "0", "1", _recall(full)))
    return markdown_table(("", "plan", "bits", "KL, nats", "top-1 agreement", "recall"), rows)


def _recall(right: Sequence[bool]) -> str:
    if not right:
        return "not measured"
    low, high = share(right).interval95
    return f"{share(right).value:.3f} ({max(low, 0):.2f} to {min(high, 1):.2f}, n = {len(right)})"


def _plan(plan: Sequence[str]) -> str:
    rows = [(name, layer_text([i for i, other in enumerate(plan) if other == name])) for name in sorted(set(plan))]
    return ("plan.yaml. K and V with their bits; b: boosted, s: symmetric.\n\n"
            + markdown_table(("format", "layers"), rows))


def _search(candidates: Sequence[dict[str, Any]], searched: dict[str, Any], tune: dict[str, Any]) -> str:
    kls = {origin: [row["kl"] for row in candidates if row["origin"] == origin] for origin in ORIGINS}
    bred = f"{min(kls['nsga2']):.4f}" if kls["nsga2"] else "none"
    return (f"{searched['candidates']} of {searched['asked']} plans: {searched['trials']} trials, of which "
            f"{searched['infeasible']} were over the budget and {searched['repeated']} repeated one. Plans were scored "
            f"on {tune['calibration_tokens']} tokens. Least KL of the {len(kls['additive'])} that the additive model "
            f"gave: {min(kls['additive']):.4f}; of those that NSGA-II bred from them: {bred}; of the additive model's "
            f"plan layer by layer, without clusters: {min(kls['additive_by_layer']):.4f}. Of {searched['scores']} "
            f"scores of this tuning, {searched['reused']} were in the cache.")


def _layers(layers: Sequence[dict[str, Any]]) -> str:
    rows = [(str(row["layer"]), layer_text(row["cluster"]), str(len(row["surviving"])), ", ".join(row["surviving"]))
            for row in layers]
    return (f"Pairs of a layer: {len(layers[0]['pairs'])}. Kept is what no pair of at most as many bits beats in "
            "KL with this layer alone.\n\n"
            + markdown_table(("layer", "cluster", "kept", "pairs"), rows))


def _all(compared: Sequence[dict[str, Any]]) -> str:
    rows = [(row["role"], row["name"], str(row["page_size"]), f"{row['effective_bits']:.3f}",
             f"{row['kl']:.4f} +- {row['kl_se']:.4f}", _recall(row["right"])) for row in compared]
    return markdown_table(("kind", "plan", "page", "bits", "KL, nats", "recall"), rows)
