"""One figure from the table alone: the seed report's claims, node 1's replies, what is valid and what is possible."""

from pathlib import Path
from typing import TYPE_CHECKING

from kvtuner_sglang.figure_style import legend_below, panels, save, styled
from kvtuner_sglang.forensics.table import CLAIMED, CLAIMED_FLOOR, FLOOR, NOT_FOUND, TABLE_FILE, TTFT, VALID

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
        ax.errorbar(part["level"] * side, part["mean"], yerr=spread, color=colour, marker=marker, linestyle="",
                    elinewidth=0.8, capsize=2, label=label)
    for series, (label, colour, style) in FLOORS.items():
        part = frame[frame["series"] == series].sort_values("level")
        ax.plot(part["level"], part["mean"], color=colour, linestyle=style, label=label)
    ax.set_xscale("log")
    ax.set_yscale("log")
    levels = sorted(frame["level"].unique())
    ax.set_xticks(levels, [str(level) for level in levels])
    ax.minorticks_off()
    ax.set_xlabel("prompt tokens")
    ax.set_ylabel("ms: mean, smallest and largest")


def figures(folder: Path) -> "dict[str, Figure]":
    """{"ttft": ...} of the first run in the table of `folder`."""
    import pandas as pd

    frame = pd.read_csv(folder / TABLE_FILE)
    frame = frame[(frame["test"] == TTFT) & (frame["run"] == frame["run"].iloc[0])]
    with styled():
        figure, axes = panels(1, 1, height_in=3.0)
        draw(axes[0, 0], frame)
        legend_below(figure, axes, columns=3)
        figure.suptitle(f"{frame['machine'].iloc[0]}, commit {frame['commit'].iloc[0]}")
    return {"ttft": figure}


def write_figure(folder: Path) -> list[Path]:
    """The figure beside the table, as .pdf and .png; the same table gives the same bytes."""
    return save(figures(folder)["ttft"], folder, Path(TABLE_FILE).stem)
