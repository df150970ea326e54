"""Three figures of one run, from its samples alone, and the paper's of all published runs.

sensitivity: a heatmap of both errors, layer by pair.  pareto: held-out KL over effective bits, all plans that were
compared.  additive: what the additive model expects of every scored plan, and what was measured.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtuner_sglang.evidence.record import load_record
from kvtuner_sglang.evidence.samples import read_samples
from kvtuner_sglang.figure_style import COLOURS, legend_below, panels, save, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Samples = Sequence[dict[str, Any]]
SMALLEST = 1e-7  # what a logarithmic axis shows of a plan that changes nothing
STYLES = {  # role: label, colour, marker, size in points
    "random": ("random", "#BBBBBB", ".", 4), "uniform": ("uniform, of conf/quant", COLOURS["kv8"], "o", 4),
    "uniform_menu": ("uniform, of the search's pairs", COLOURS["k8v4"], "s", 4),
    "first_last": ("first and last layers high", COLOURS["kv2"], "^", 4.5),
    "published": ("published plan", COLOURS["kv4_token"], "D", 4),
    "front": ("front of the search", COLOURS["k4v2"], "o", 4),
    "tuned": ("tuned plan", COLOURS["kv4"], "*", 9), "additive": ("additive model", "#000000", "x", 4),
}
ORIGINS = {
    "nsga2": ("found by NSGA-II", COLOURS["k4v2"]), "additive": ("solved in the additive model", "#000000"),
    "additive_by_layer": ("the same, layer by layer", COLOURS["kv2"]),
}


def of_kind(samples: Samples, kind: str) -> list[dict[str, Any]]:
    return [sample for sample in samples if sample["kind"] == kind]


def sensitivity(samples: Samples) -> "Figure":
    """Both errors, log10, pairs ordered by bits; a dot marks what survived pruning."""
    layers = of_kind(samples, "layer")
    order = np.argsort(layers[0]["effective_bits"], kind="stable")
    names = [f"{layers[0]['pairs'][i]} {layers[0]['effective_bits'][i]:.3f}" for i in order]
    figure, axes = panels(1, 2, height_in=1.5 + 0.11 * len(layers))
    for ax, column, title in zip(axes[0], ("attention_error", "kl"), (
            "relative error of attention output", "KL with this layer alone, nats"), strict=True):
        values = np.array([layer[column] for layer in layers])[:, order]
        image = ax.imshow(np.log10(np.maximum(values, SMALLEST)), aspect="auto", cmap="viridis", interpolation="none")
        for row, layer in enumerate(layers):
            kept = [column for column, i in enumerate(order) if layer["pairs"][i] in layer["surviving"]]
            ax.scatter(kept, [row] * len(kept), s=2, color="white")
        ax.grid(visible=False)
        ax.set_xticks(range(len(names)), names, rotation=90)
        ax.set_title(f"log10 of {title}")
        figure.colorbar(image, ax=ax)
    axes[0, 0].set_yticks(range(len(layers)), [layer["layer"] for layer in layers])
    axes[0, 0].set_ylabel("layer")
    return figure


def draw_pareto(ax: "Axes", samples: Samples) -> None:
    """Held-out KL of every plan that was compared; error bars: 1.96 standard errors."""
    compared = of_kind(samples, "compared")
    for role, (label, colour, marker, size) in STYLES.items():
        if rows := [row for row in compared if row["role"] == role]:
            ax.errorbar([row["effective_bits"] for row in rows], [max(row["kl"], SMALLEST) for row in rows],
                        yerr=[1.96 * row["kl_se"] for row in rows], linestyle="", marker=marker, markersize=size,
                        color=colour, elinewidth=0.5, label=label)
    ax.set_yscale("log")
    ax.set_xlabel("effective bits per cached element")


def pareto(samples: Samples) -> "Figure":
    figure, axes = panels(1, 1, height_in=3.4)
    draw_pareto(axes[0, 0], samples)
    axes[0, 0].set_ylabel("KL(full || quantized) on held-out text, nats")
    legend_below(figure, axes, columns=4)
    return figure


def additive(samples: Samples) -> "Figure":
    figure, axes = panels(1, 1, height_in=3.2, width_in=4)
    ax = axes[0, 0]
    for origin, (label, colour) in ORIGINS.items():
        rows = [row for row in of_kind(samples, "candidate") if row["origin"] == origin]
        ax.plot([row["kl_summed"] for row in rows], [row["kl"] for row in rows], linestyle="", marker="o",
                color=colour, label=label)
    low, high = ax.get_xlim()
    ax.plot([low, high], [low, high], color="black", linewidth=0.6)
    ax.set_xlabel("sum of the layers' own KL, nats")
    ax.set_ylabel("KL measured on calibration text, nats")
    legend_below(figure, axes)
    return figure


FIGURES: dict[str, Callable[[Samples], "Figure"]] = {"sensitivity": sensitivity, "pareto": pareto, "additive": additive}


def write_figures(run_dir: Path) -> list[Path]:
    """Each figure as .pdf and .png in run_dir; the same samples give the same bytes."""
    samples, paths = read_samples(run_dir), []
    for name, draw in FIGURES.items():
        with styled():
            figure = draw(samples)
        paths += save(figure, run_dir, name)
    return paths


def figures(folder: Path) -> "dict[str, Figure]":
    """{"pareto": ...} of a published folder, a panel a model and budget."""
    runs = sorted((record.config["model"]["name"], record.config["tune"]["bits"], path.parent)
                   for path in folder.glob("tune-*/record.json") for record in (load_record(path.parent),))
    if not runs:
        return {}
    with styled():
        rows = -(-len(runs) // 2)
        figure, axes = panels(rows, min(2, len(runs)), height_in=0.6 + 2.3 * rows)
        for ax in axes.flat[len(runs):]:
            ax.set_visible(False)
        for ax, (model, bits, run_dir) in zip(axes.flat, runs, strict=False):
            draw_pareto(ax, read_samples(run_dir))
            ax.axvline(bits, color="black", linewidth=0.6, linestyle=":")
            ax.set_title(f"{model}, within {bits:g} bits")
        for ax in axes[:, 0]:
            ax.set_ylabel("KL on held-out text, nats")
        for ax in axes[:-1].flat:  # the panels share their scales
            ax.set_xlabel("")
        legend_below(figure, axes, columns=4)
    return {"pareto": figure}
