"""The ablation of one machine at a look, from its CSV alone: tokens held, first token, rate; a bar a format."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from kvtuner_sglang.figure_style import COLOURS, colour, commits_of, drawn_tables, legend_below, panels

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LAYOUTS = ("single", "tp2", "pp2", "tp2pp2")
MEASURES = ("kv_tokens", "ttft_p50_ms", "output_tok_s")
ELSEWHERE = "/////"  # times from another machine than those of the layout's first format
GROUP_WIDTH = 0.84  # of the distance from one layout to the next


def at_most(frame: "pd.DataFrame", column: str) -> "tuple[pd.DataFrame, str]":
    """The rows in which `column` was measured under the most of its load, and what the axis says of it."""
    rows = frame[frame[column].notna()]
    if column == "ttft_p50_ms":
        most = rows["prompt_tokens"].max()
        return rows[rows["prompt_tokens"] == most], f"TTFT of {most} tokens,\nmedian, ms"
    if column == "output_tok_s":
        most = rows["concurrency"].max()
        return rows[rows["concurrency"] == most], f"output tokens/s,\n{most} at once"
    return rows.drop_duplicates(["dist", "quant"]), "KV tokens"


def measured_apart(floor: float, other: float) -> bool:
    """RunRecord.measured_apart of two rows, in which NaN is a job that was not run or a floor that is not known."""
    return not math.isnan(floor) and not math.isnan(other) and floor != other


def first_floor(rows: "pd.DataFrame", layout: str) -> float:
    """What the machine of a layout's first format, by the order of their colours, measured of itself."""
    floors = rows[rows["dist"] == layout].set_index("quant")["tpot_floor_ms"]
    return float(next(floors[name] for name in COLOURS if name in floors.index))


def draw(ax: "Axes", frame: "pd.DataFrame", column: str) -> None:
    """One measure: groups are layouts, bars formats in the order of their colours."""
    from matplotlib.ticker import EngFormatter

    rows, label = at_most(frame, column)
    names = [name for name in COLOURS if name in set(frame["quant"])]
    layouts = [name for name in LAYOUTS if name in set(frame["dist"])]
    width = GROUP_WIDTH / len(names)
    for i, name in enumerate(names):
        of_format = rows[rows["quant"] == name].set_index("dist").reindex(layouts)
        at = [group + (i - (len(names) - 1) / 2) * width for group in range(len(layouts))]
        bars = ax.bar(at, of_format[column], width=width, color=colour(name), label=name)
        for bar, layout, floor in zip(bars, layouts, of_format["tpot_floor_ms"], strict=True):
            if column != "kv_tokens" and measured_apart(floor, first_floor(rows, layout)):
                bar.set(hatch=ELSEWHERE, edgecolor="white")
    ax.set_xticks(range(len(layouts)), layouts)
    ax.grid(visible=False, axis="x")
    ax.set_ylabel(label)
    if column == "kv_tokens":
        ax.yaxis.set_major_formatter(EngFormatter(sep=""))  # 600k, 2M


def served_figure(frame: "pd.DataFrame") -> "Figure":
    """The formats that have a colour; others, and plans by layer, are rows of the table alone."""
    frame = frame[frame["quant"].isin(COLOURS)]
    figure, axes = panels(len(MEASURES), 1, height_in=3.5, shared=False)
    for ax, column in zip(axes[:, 0], MEASURES, strict=True):
        draw(ax, frame, column)
    legend_below(figure, axes, columns=8)
    hatched = any(bar.get_hatch() for ax in axes.flat for bar in ax.patches)
    figure.suptitle(f"{frame['model'].iloc[0]} on {frame['machine'].iloc[0]}; {commits_of(frame)}"
                    f"{'; hatched: another machine of the kind' if hatched else ''}")
    return figure


def figures(folder: Path) -> "dict[str, Figure]":
    """{"<machine>_served": ...} of every <machine>.csv of a published folder."""
    import pandas as pd

    return drawn_tables(folder, pd.read_csv, {"served": served_figure})
