"""The one look of every figure, and how it is kept: the same table gives the same bytes, whoever draws it.

    with styled():
        figure, axes = panels(1, 2, height_in=2.4)
        ...
    save(figure, folder, "kl")
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_IN = 6.5  # the text width of paper/main.typ
LEGEND_COLUMNS = 6
SUFFIXES = {".pdf": {"CreationDate": None}, ".png": {"Software": None}}  # and metadata that would change with the day
STYLE = {
    "axes.titlesize": 7, "axes.labelsize": 7, "xtick.labelsize": 6, "ytick.labelsize": 6,
    "legend.fontsize": 6, "figure.titlesize": 7, "lines.linewidth": 0.9, "lines.markersize": 3,
    "axes.linewidth": 0.6, "axes.grid": True, "grid.linewidth": 0.3, "grid.alpha": 0.6, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "savefig.dpi": 200,
    "pdf.fonttype": 42,
    "pdf.compression": 0,  # else the bytes would depend on which zlib Python was built with
}
# Okabe and Ito's colours, which readers with any colour vision tell apart; a format has the same in every figure
COLOURS = {
    "bf16": "#000000", "fp8": "#999999", "kv8": "#0072B2", "kv4": "#D55E00", "kv2": "#009E73", "kv4_token": "#CC79A7",
    "k8v4": "#56B4E9", "k4v2": "#E69F00",
}
OTHER_COLOUR = "#555555"


def colour(name: str) -> str:
    """The colour of a format in every figure; grey for one that has none of its own."""
    return COLOURS.get(name, OTHER_COLOUR)


@contextmanager
def styled() -> Iterator[None]:
    """Everything drawn inside looks the same, whatever the user's own matplotlibrc says."""
    import matplotlib as mpl
    from matplotlib import style

    with mpl.rc_context(), style.context(["default", STYLE]):
        yield


def panels(rows: int, columns: int, height_in: float, width_in: float = WIDTH_IN, *,
           shared: bool = True) -> "tuple[Figure, np.ndarray]":
    """A figure, by default of the paper's width, and its axes (rows, columns), which share both their scales."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    return figure, figure.subplots(rows, columns, sharex=shared, sharey=shared, squeeze=False)


def legend_below(figure: "Figure", axes: "np.ndarray", columns: int = LEGEND_COLUMNS) -> None:
    """One legend under the panels with everything that any of them shows, at most `columns` in a row."""
    handles: dict[str, Artist] = {}
    for ax in axes.flat:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    equal = -(-len(handles) // -(-len(handles) // columns))  # rows of equal length
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=equal)


def drawn_tables(folder: Path, read: "Callable[[Path], pd.DataFrame]",
                 draw: "Mapping[str, Callable[[pd.DataFrame], Figure]]") -> "dict[str, Figure]":
    """{"<table>_<name>": figure} of every CSV of a folder, for each name of `draw`; a table without rows has none."""
    drawn: dict[str, Figure] = {}
    for path in sorted(folder.glob("*.csv")):
        frame = read(path)
        if not frame.empty:
            with styled():
                drawn |= {f"{path.stem}_{name}": figure(frame) for name, figure in draw.items()}
    return drawn


def commits_of(frame: "pd.DataFrame") -> str:
    """What a figure says of the code that its rows were measured with."""
    return f"commit {', '.join(sorted(frame['commit'].astype(str).unique()))}"


def token_ticks(ax: "Axes", contexts: Sequence[int]) -> None:
    """A logarithmic axis of tokens that is marked at `contexts`: 1k, 4k, 32k."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(contexts, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in contexts])
    ax.minorticks_off()


def save(figure: "Figure", folder: Path, name: str) -> list[Path]:
    """folder/name.pdf and .png; the same figure gives the same bytes."""
    paths = []
    with styled():  # resolution and fonts are read when it is written
        for suffix, metadata in SUFFIXES.items():
            paths.append(folder / f"{name}{suffix}")
            figure.savefig(paths[-1], metadata=metadata)
    return paths
