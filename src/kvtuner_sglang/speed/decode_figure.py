"""Decode tokens/s by batch, a panel a context and a line a format, from one GPU's CSV alone."""

from pathlib import Path
from typing import TYPE_CHECKING

from kvtuner_sglang.figure_style import colour, legend_below, panels, styled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = {"flashinfer": "-", "kvtuner": "-", "triton": ":"}  # who reads the cache; colour is the format


def draw(ax: "Axes", frame: "pd.DataFrame") -> None:
    """One model and context. Lines: the same batch for every format; stars: as many requests as each format holds."""
    from matplotlib.ticker import ScalarFormatter

    for (name, backend), rows in frame.groupby(["quant", "backend"]):
        decode = rows[rows["workload"] == "decode"].sort_values("batch")
        ax.plot(decode["batch"], decode["decode_tok_s"], color=colour(name), linestyle=LINES.get(backend, "--"),
                marker="o", label=f"{name} {backend}")
        full = rows[rows["workload"] == "saturation"]
        ax.scatter(full["batch"], full["decode_tok_s"], color=colour(name), marker="*", s=40, zorder=3)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.set_xlabel("requests at once")
    ax.set_title(f"{frame['model'].iloc[0]}, {frame['context'].iloc[0]} tokens of context")


def decode_figure(frame: "pd.DataFrame") -> "Figure":
    cells = [rows for _, rows in frame.groupby(["model", "context"])]
    figure, axes = panels(1, len(cells), height_in=2.8)
    for ax, rows in zip(axes[0], cells, strict=True):
        draw(ax, rows)
    axes[0, 0].set_ylabel("decode tokens/s (stars: pool full)")
    legend_below(figure, axes)
    commits = ", ".join(sorted(frame["commit"].astype(str).unique()))
    figure.suptitle(f"{frame['gpu'].iloc[0]}; commit {commits}")
    return figure


def figures(folder: Path) -> "dict[str, Figure]":
    """{"<gpu>_decode": ...} of every <gpu>.csv of a published folder that has decode rates."""
    import pandas as pd

    drawn = {}
    for path in sorted(folder.glob("*.csv")):
        frame = pd.read_csv(path)
        frame = frame[frame["decode_tok_s"].notna()]
        if not frame.empty:
            with styled():
                drawn[f"{path.stem}_decode"] = decode_figure(frame)
    return drawn
