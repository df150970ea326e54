"""Three figures of one run, from its samples alone: the same samples give the same bytes.

sensitivity: a heatmap of both errors, layer by pair.  pareto: held-out KL over effective bits, all plans that were
compared.  additive: what the additive model expects of every scored plan, and what was measured.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtuner_sglang.evidence.samples import read_samples

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Samples = Sequence[dict[str, Any]]
SMALLEST = 1e-7
STYLES = {  # role: label, colour, marker, size
    "random": ("random", "0.7", ".", 14), "uniform": ("uniform (conf/quant)", "C0", "o", 18),
    "uniform_menu": ("uniform (the menu's pairs)", "C0", "s", 16),
    "first_last": ("first and last layers high", "C2", "^", 22),
    "published": ("published plan", "C4", "D", 20), "additive": ("additive model", "C3", "x", 26),
    "front": ("front of the search", "C1", "o", 18), "tuned": ("tuned plan", "C1", "*", 70),
}


def of_kind(samples: Samples, kind: str) -> list[dict[str, Any]]:
    return [sample for sample in samples if sample["kind"] == kind]


def sensitivity(samples: Samples) -> "Figure":
    """Both errors, log10, pairs ordered by bits; a dot marks what survived pruning."""
    import matplotlib.pyplot as plt

    layers = of_kind(samples, "layer")
    order = np.argsort(layers[0]["effective_bits"], kind="stable")
    names = [f"{layers[0]['pairs'][i]} {layers[0]['effective_bits'][i]:.3f}" for i in order]
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.6 + 0.17 * len(layers) + 1.2), sharey=True, layout="constrained")
    for ax, column, title in zip(axes, ("attention_error", "kl"), (
            "relative error of attention output", "KL with this layer alone, nats"), strict=True):
        values = np.array([layer[column] for layer in layers])[:, order]
        image = ax.imshow(np.log10(np.maximum(values, SMALLEST)), aspect="auto", cmap="viridis")
        for row, layer in enumerate(layers):
            kept = [column for column, i in enumerate(order) if layer["pairs"][i] in layer["surviving"]]
            ax.scatter(kept, [row] * len(kept), s=3, color="white")
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
        ax.set_title(f"log10 of {title}", fontsize=8)
        figure.colorbar(image, ax=ax).ax.tick_params(labelsize=6)
    axes[0].set_yticks(range(len(layers)), [layer["layer"] for layer in layers], fontsize=6)
    axes[0].set_ylabel("layer", fontsize=7)
    return figure


def pareto(samples: Samples) -> "Figure":
    """Error bars: 1.96 standard errors."""
    import matplotlib.pyplot as plt

    compared = of_kind(samples, "compared")
    figure, ax = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for role, (label, colour, marker, size) in STYLES.items():
        rows = [row for row in compared if row["role"] == role]
        if not rows:
            continue
        bits, kl = [row["effective_bits"] for row in rows], [max(row["kl"], SMALLEST) for row in rows]
        ax.scatter(bits, kl, s=size, c=colour, marker=marker, linewidths=0.9, label=label, zorder=3)
        ax.errorbar(bits, kl, yerr=[1.96 * row["kl_se"] for row in rows], fmt="none", ecolor=colour, elinewidth=0.5)
    ax.set_yscale("log")
    ax.set_xlabel("effective bits per cached element, metadata counted", fontsize=7)
    ax.set_ylabel("KL(full || quantized) on held-out text, nats", fontsize=7)
    ax.tick_params(labelsize=7)
    ax.grid(visible=True, linewidth=0.3)
    ax.legend(fontsize=6)
    return figure


def additive(samples: Samples) -> "Figure":
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(4, 3.6), layout="constrained")
    for origin, colour in (("nsga2", "C1"), ("additive", "C3")):
        rows = [row for row in of_kind(samples, "candidate") if row["origin"] == origin]
        ax.scatter([row["kl_summed"] for row in rows], [row["kl"] for row in rows], s=8, color=colour,
                   label={"nsga2": "found by NSGA-II", "additive": "solved in the additive model"}[origin])
    low, high = ax.get_xlim()
    ax.plot([low, high], [low, high], color="black", linewidth=0.6)
    ax.set_xlabel("sum of the layers' own KL, nats", fontsize=7)
    ax.set_ylabel("KL measured on calibration text, nats", fontsize=7)
    ax.tick_params(labelsize=7)
    ax.legend(fontsize=6)
    return figure


FIGURES: dict[str, Callable[[Samples], "Figure"]] = {"sensitivity": sensitivity, "pareto": pareto, "additive": additive}


def write_figures(run_dir: Path) -> list[Path]:
    """Each figure as .pdf and .png in run_dir."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    samples, paths = read_samples(run_dir), []
    for name, draw in FIGURES.items():
        figure = draw(samples)
        for suffix, metadata in ((".pdf", {"CreationDate": None}), (".png", {"Software": None})):
            paths.append((run_dir / name).with_suffix(suffix))
            figure.savefig(paths[-1], metadata=metadata, dpi=160)
        plt.close(figure)
    return paths
