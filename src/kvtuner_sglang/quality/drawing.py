"""The figures of quality, from summary.csv alone."""

from pathlib import Path
from typing import TYPE_CHECKING

from kvtuner_sglang.figure_style import COLOURS, OTHER_COLOUR, legend_below, panels, styled
from kvtuner_sglang.quality.summary import CSV_FILE

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURES = {"kl": "KL(full || quantized), nats", "recall": "recall of 4-digit codes, share right"}
# what can be served; a token's own scale is a square, a page's and channel's a circle
SERVED = {"kv8": "o", "kv8_token": "s", "k8v4": "o", "kv4": "o", "kv4_unboosted": "v", "kv4_token": "s", "k4v2": "o",
          "kv2": "o"}
SHADE = {"kv8_token": COLOURS["kv8"], "kv4_unboosted": COLOURS["kv4"]}
ENGINES = ("transformers", "sglang")  # the served one is drawn last, so over the other
RECIPES = "other recipes"
SMALLEST_KL = 1e-7  # what a logarithmic axis shows of a format that changes nothing
FULL_BITS = 16


def draw(ax: "Axes", frame: "pd.DataFrame", column: str) -> None:
    """One model's `column` against effective bits, with its standard error.

    Filled: through the SGLang engine; hollow: fake quantization in transformers; dots: recipes that are not served;
    dashed: full precision.
    """
    shown = frame[frame[column].notna() & (frame["effective_bits"] < FULL_BITS)].copy()
    if column == "kl":
        shown[column] = shown[column].clip(lower=SMALLEST_KL)
        ax.set_yscale("log")
    recipes = shown[~shown["quant"].isin(SERVED)]
    ax.plot(recipes["effective_bits"], recipes[column], linestyle="", marker=".", markersize=2.5, color=OTHER_COLOUR,
            label=RECIPES)
    for name, marker in SERVED.items():
        shade = SHADE.get(name) or COLOURS[name]
        of_engine = {engine: rows for engine in ENGINES
                     if not (rows := shown[(shown["quant"] == name) & (shown["engine"] == engine)]).empty}
        for engine, rows in of_engine.items():
            ax.errorbar(rows["effective_bits"], rows[column], yerr=rows[f"{column}_se"].fillna(0), linestyle="",
                        marker=marker, markersize=4, color=shade, markeredgewidth=0.8, elinewidth=0.6,
                        markerfacecolor=shade if engine == "sglang" else "none",
                        label=name if engine == list(of_engine)[-1] else None)
    full = frame["recall_full"].dropna()
    if column == "recall" and not full.empty:
        ax.axhline(full.iloc[0], color="black", linewidth=0.6, linestyle="--", label="full precision")
    ax.set_title(frame["model"].iloc[0])
    ax.set_xlabel("effective bits per cached element")


def figures(folder: Path) -> "dict[str, Figure]":
    """{"kl": ..., "recall": ...}, a panel a model."""
    import pandas as pd

    frame = pd.read_csv(folder / CSV_FILE)
    drawn = {}
    for column, label in FIGURES.items():
        models = [rows for _, rows in frame.groupby("model") if rows[column].notna().any()]
        with styled():
            figure, axes = panels(1, len(models), height_in=2.7)
            for ax, rows in zip(axes[0], models, strict=True):
                draw(ax, rows, column)
            axes[0, 0].set_ylabel(label)
            legend_below(figure, axes)
            drawn[column] = figure
    return drawn
