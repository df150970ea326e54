"""Two figures from one GPU's table and nothing else.

roofline: time against bytes, beside a plain read of as many.  speedup: times as fast as FlashInfer in
bf16, by context and batch.  Shown are the formats in SERIES; the table has the others, too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.figure_style import (
    OTHER_COLOUR,
    colour,
    commits_of,
    drawn_tables,
    legend_below,
    panels,
    token_ticks,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = {  # (kernel, format): label, colour, marker
    ("kvtuner", "kv8"): ("kv8", colour("kv8"), "o"),
    ("kvtuner", "kv4"): ("kv4", colour("kv4"), "o"),
    ("kvtuner", "kv2"): ("kv2", colour("kv2"), "o"),
    ("kvtuner", "kv4_token"): ("kv4_token", colour("kv4_token"), "o"),
    ("flashinfer", "bf16"): ("FlashInfer bf16", colour("bf16"), "x"),
    ("flashinfer", "fp8"): ("FlashInfer fp8", colour("fp8"), "x"),
    ("sglang_triton", "bf16"): ("SGLang Triton bf16", OTHER_COLOUR, "+"),
}
BASELINE = ("flashinfer", "bf16")
SHAPE = ["q_heads", "kv_heads", "head_dim"]


def shown(frame: "pd.DataFrame", kernel: str, name: str) -> "pd.DataFrame":
    return frame[(frame["kernel"] == kernel) & (frame["format"] == name)]


def draw_roofline(ax: "Axes", frame: "pd.DataFrame") -> None:
    """One shape: each kernel's median time at every cell over the bytes it must move, and a plain read of as many."""
    for (kernel, name), (label, shade, marker) in SERIES.items():
        rows = shown(frame, kernel, name)
        if not rows.empty:
            ax.scatter(rows["bytes"] / 1e6, rows["median_us"], s=12, c=shade, marker=marker, linewidths=0.8,
                       label=label)
    plain = frame.sort_values("bytes")
    ax.plot(plain["bytes"] / 1e6, plain["floor_us"], color="black", linewidth=0.7, label="plain read of the same bytes")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("MB that one layer must read")


def speedups(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Every row with `speedup`: FlashInfer's time in bf16 at the same cell over its own; cells without it are left out.

    Raises UserError if there is none.
    """
    cell = [*SHAPE, "batch", "context"]
    base = shown(frame, *BASELINE)[[*cell, "median_us"]].rename(columns={"median_us": "base_us"})
    joined = frame.merge(base, on=cell)
    if joined.empty:
        raise UserError("no row of FlashInfer in bf16 to compare with: run task=kernels with kernels.peers=true.")
    return joined.assign(speedup=joined["base_us"] / joined["median_us"])


def draw_speedup(ax: "Axes", frame: "pd.DataFrame", contexts: Sequence[int]) -> None:
    """One shape and batch: speed-up over context, a line a kernel and format; `contexts` are marked."""
    for (kernel, name), (label, shade, marker) in SERIES.items():
        rows = shown(frame, kernel, name).sort_values("context")
        if (kernel, name) != BASELINE and not rows.empty:
            ax.plot(rows["context"], rows["speedup"], color=shade, marker=marker, label=label)
    ax.axhline(1, color="black", linewidth=0.6, linestyle="--")
    token_ticks(ax, contexts)


def roofline(frame: "pd.DataFrame") -> "Figure":
    shapes = list(frame.groupby(SHAPE))
    figure, axes = panels(1, len(shapes), height_in=2.6)
    for ax, (shape, rows) in zip(axes[0], shapes, strict=True):
        draw_roofline(ax, rows)
        ax.set_title(_title(shape))
    axes[0, 0].set_ylabel("µs a layer, median")
    legend_below(figure, axes)
    figure.suptitle(f"{frame['gpu'].iloc[0]}, {commits_of(frame)}")
    return figure


def speedup(frame: "pd.DataFrame") -> "Figure":
    frame = speedups(frame)
    shapes, batches = list(frame.groupby(SHAPE)), sorted(frame["batch"].unique())
    figure, axes = panels(len(shapes), len(batches), height_in=0.8 + 1.3 * len(shapes))
    for line, (shape, rows) in zip(axes, shapes, strict=True):
        for ax, batch in zip(line, batches, strict=True):
            part = rows[rows["batch"] == batch]
            if part.empty:
                ax.set_axis_off()
                continue
            draw_speedup(ax, part, sorted(frame["context"].unique()))
            ax.set_title(f"{_title(shape)}, batch {batch}")
            ax.tick_params(labelbottom=True)
        line[0].set_ylabel("times as fast")
    for ax in axes[-1]:
        ax.set_xlabel("context, tokens")
    legend_below(figure, axes)
    figure.suptitle(f"Decode attention over FlashInfer in bf16, {frame['gpu'].iloc[0]}, {commits_of(frame)}")
    return figure


def _title(shape: tuple[int, int, int]) -> str:
    return "/".join(map(str, shape))


def read_table(path: Path) -> "pd.DataFrame":
    """One GPU's table; raises UserError if it mixes machines or commits."""
    import pandas as pd

    frame = pd.read_csv(path)
    for column in ("gpu", "commit"):
        if frame[column].nunique() != 1:
            raise UserError(f"{path} mixes values of {column} ({', '.join(map(str, frame[column].unique()))}): "
                            "a figure shows one run.")
    return frame


def figures(folder: Path) -> "dict[str, Figure]":
    """{"<gpu>_roofline": ..., "<gpu>_speedup": ...} of every <gpu>.csv of a published folder."""
    return drawn_tables(folder, read_table, {"roofline": roofline, "speedup": speedup})
