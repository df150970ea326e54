"""Decode tokens/s of every format, a panel a context and number of requests, from one GPU's CSV alone."""

from pathlib import Path
from typing import TYPE_CHECKING

from kvtuner_sglang.figure_style import colour, commits_of, drawn_tables, panels

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ORDER = ("bf16", "fp8", "kv8", "kv4", "kv2")  # others after them
BACKENDS = {"flashinfer": "FlashInfer", "triton": "Triton"}  # who reads a cache that is not packed
POOL_FULL = "saturation"


def _label(name: str, backend: str) -> str:
    return f"{name}\n{BACKENDS[backend]}" if backend in BACKENDS else name


def _rank(name: str) -> int:
    return ORDER.index(name) if name in ORDER else len(ORDER)


def draw(ax: "Axes", frame: "pd.DataFrame", bars_wide: int) -> None:
    """One cell, in room for `bars_wide` bars: one a format and backend, its rate above it.

    Of a full pool also how many requests it holds.
    """
    rows = sorted(frame.itertuples(), key=lambda row: (_rank(row.quant), row.backend))
    full = frame["workload"].iloc[0] == POOL_FULL
    labels = [_label(row.quant, row.backend) + (f"\n{row.batch} requests" if full else "") for row in rows]
    drawn = ax.bar(range(len(rows)), [row.decode_tok_s for row in rows], color=[colour(row.quant) for row in rows],
                   hatch=["//" if row.backend == "triton" else "" for row in rows], edgecolor="white", linewidth=0)
    ax.bar_label(drawn, fmt="{:,.0f}", fontsize=6)
    ax.margins(y=0.12)
    ax.set_xlim(-0.6, bars_wide - 0.4)
    ax.set_xticks(range(len(rows)), labels)
    ax.grid(visible=False, axis="x")


def _title(model: str, context: int, workload: str, batch: int) -> str:
    if workload == POOL_FULL:
        return f"{model}, as many requests of {context:,} tokens as the pool holds"
    return f"{model}, {batch} request{'s' if batch > 1 else ''} of {context:,} tokens"


def decode_figure(frame: "pd.DataFrame") -> "Figure":
    same = frame["batch"].where(frame["workload"] != POOL_FULL, 0)  # a full pool is one cell, whatever it holds
    cells = list(frame.groupby(["model", "context", "workload", same.rename("requests")]))
    figure, axes = panels(len(cells), 1, height_in=0.4 + 1.35 * len(cells), shared=False)
    for ax, ((model, context, workload, batch), rows) in zip(axes[:, 0], cells, strict=True):
        draw(ax, rows, max(len(cell) for _, cell in cells))
        ax.set_title(_title(model, context, workload, batch))
        ax.set_ylabel("decode tokens/s")
    figure.suptitle(f"{frame['gpu'].iloc[0]}; {commits_of(frame)}")
    return figure


def read_rates(path: Path) -> "pd.DataFrame":
    """The rows of a GPU's table that have a decode rate."""
    import pandas as pd

    frame = pd.read_csv(path)
    return frame[frame["decode_tok_s"].notna()]


def figures(folder: Path) -> "dict[str, Figure]":
    """{"<gpu>_decode": ...} of every <gpu>.csv of a published folder that has decode rates."""
    return drawn_tables(folder, read_rates, {"decode": decode_figure})
