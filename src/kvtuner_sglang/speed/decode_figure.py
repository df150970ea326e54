"""Decode tokens/s by batch, a panel a context and a line a format, from one GPU's CSV alone."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def draw(ax: "Axes", frame: "pd.DataFrame", colours: dict[str, str]) -> None:
    """One context. Lines: the same batch for every format; stars: as many requests as each format holds."""
    for name, rows in frame.groupby("name", sort=False):
        decode = rows[rows["workload"] == "decode"].sort_values("batch")
        ax.plot(decode["batch"], decode["decode_tok_s"], color=colours[name], marker="o", markersize=3, linewidth=0.9,
                label=name)
        full = rows[rows["workload"] == "saturation"]
        ax.scatter(full["batch"], full["decode_tok_s"], color=colours[name], marker="*", s=45, zorder=3)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("requests at once", fontsize=7)
    ax.set_title(f"{frame['context'].iloc[0]} tokens of context", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.grid(visible=True, linewidth=0.3)


def write_figure(csv: Path) -> list[Path]:
    """<csv>-decode.pdf and .png of every model in the table; the same CSV gives the same bytes."""
    import matplotlib as mpl
    import pandas as pd

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    frame = pd.read_csv(csv)
    frame = frame[frame["decode_tok_s"].notna()]
    frame["name"] = frame["quant"] + " " + frame["backend"]
    if frame.empty:
        return []
    colours = {name: f"C{number % 10}" for number, name in enumerate(sorted(frame["name"].unique()))}
    panels = [rows for _, rows in frame.groupby(["model", "context"])]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.4), sharey=True, squeeze=False,
                                layout="constrained")
    for ax, rows in zip(axes[0], panels, strict=True):
        draw(ax, rows, colours)
    axes[0, 0].set_ylabel("decode tokens/s (stars: pool full)", fontsize=7)
    handles = [mpl.lines.Line2D([], [], color=colour, marker="o", markersize=3, linewidth=0.9, label=name)
               for name, colour in colours.items()]
    axes[0, 0].legend(handles=handles, fontsize=6)
    commits = ", ".join(sorted(frame["commit"].astype(str).unique()))
    figure.suptitle(f"{frame['gpu'].iloc[0]}, {', '.join(sorted(frame['model'].unique()))}; commit {commits}",
                    fontsize=7)
    paths = []
    for suffix, metadata in ((".pdf", {"CreationDate": None}), (".png", {"Software": None})):
        paths.append(csv.with_name(f"{csv.stem}-decode{suffix}"))
        figure.savefig(paths[-1], metadata=metadata, dpi=200)
    plt.close(figure)
    return paths
