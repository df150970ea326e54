"""One figure from the table alone: the seed report's claims, node 1's replies, what is valid and what is possible."""

from pathlib import Path
from typing import TYPE_CHECKING

from kvtuner_sglang.forensics.table import CLAIMED, CLAIMED_FLOOR, FLOOR, NOT_FOUND, TTFT, VALID

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

MEASURED = {  # series: label, colour, marker, side: shifted so that the bars of equal values are both seen
    VALID: ("TTFT of node 0, valid", "#0072B2", "o", 1.0),
    CLAIMED: ('"TTFT" claimed by the seed report', "#D55E00", "s", 0.97),
    NOT_FOUND: ("replies of node 1, HTTP 404", "#000000", "x", 1.03),
}
FLOORS = {
    FLOOR: ("least time on this machine", "#0072B2", ":"),
    CLAIMED_FLOOR: ("least time on the seed's four RTX 4090", "#D55E00", "--"),
}


def draw(ax: "Axes", frame: "pd.DataFrame") -> None:
    """Means with their extremes over the prompt length, and the floors as lines; one run."""
    for series, (label, colour, marker, side) in MEASURED.items():
        part = frame[frame["series"] == series].sort_values("level")
        spread = [part["mean"] - part["min"], part["max"] - part["mean"]]
        ax.errorbar(part["level"] * side, part["mean"], yerr=spread, color=colour, marker=marker, markersize=3,
                    linewidth=0, elinewidth=0.8, capsize=2, label=label)
    for series, (label, colour, style) in FLOORS.items():
        part = frame[frame["series"] == series].sort_values("level")
        ax.plot(part["level"], part["mean"], color=colour, linestyle=style, linewidth=0.9, label=label)
    ax.set_xscale("log")
    ax.set_yscale("log")
    levels = sorted(frame["level"].unique())
    ax.set_xticks(levels, [str(level) for level in levels])
    ax.minorticks_off()
    ax.tick_params(labelsize=7)
    ax.set_xlabel("prompt tokens", fontsize=7)
    ax.set_ylabel("ms: mean, smallest and largest", fontsize=7)
    ax.grid(visible=True, linewidth=0.3)


def write_figure(csv: Path) -> list[Path]:
    """<csv>.pdf and .png of the first run in the table; the same CSV gives the same bytes."""
    import matplotlib as mpl
    import pandas as pd

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    frame = pd.read_csv(csv)
    frame = frame[(frame["test"] == TTFT) & (frame["run"] == frame["run"].iloc[0])]
    figure, ax = plt.subplots(figsize=(6.5, 3.0), layout="constrained")
    draw(ax, frame)
    figure.legend(fontsize=6, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{frame['machine'].iloc[0]}, commit {frame['commit'].iloc[0]}", fontsize=7)
    paths = []
    for suffix, metadata in ((".pdf", {"CreationDate": None}), (".png", {"Software": None})):
        paths.append(csv.with_suffix(suffix))
        figure.savefig(paths[-1], metadata=metadata, dpi=200)
    plt.close(figure)
    return paths
