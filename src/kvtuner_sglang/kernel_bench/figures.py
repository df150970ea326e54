"""Two figures from one GPU's table and nothing else: the same CSV gives the same bytes.

roofline: time against bytes, beside the floor that reading those bytes sets.  speedup: times as fast as FlashInfer in
bf16, by context and batch.  Shown are the formats in SERIES; the table has the others, too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvtuner_sglang.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = {  # (kernel, format): label, colour, marker
    ("kvtuner", "kv8"): ("kv8", "C0", "o"),
    ("kvtuner", "kv4"): ("kv4", "C1", "o"),
    ("kvtuner", "kv2"): ("kv2", "C2", "o"),
    ("kvtuner", "kv4_token"): ("kv4_token", "C3", "o"),
    ("flashinfer", "bf16"): ("FlashInfer bf16", "black", "x"),
    ("flashinfer", "fp8"): ("FlashInfer fp8", "grey", "x"),
    ("sglang_triton", "bf16"): ("SGLang Triton bf16", "C4", "+"),
}
BASELINE = ("flashinfer", "bf16")
SHAPE = ["q_heads", "kv_heads", "head_dim"]


def shown(frame: "pd.DataFrame", kernel: str, name: str) -> "pd.DataFrame":
    return frame[(frame["kernel"] == kernel) & (frame["format"] == name)]


def draw_roofline(ax: "Axes", frame: "pd.DataFrame") -> None:
    """One shape: each kernel's median time at every cell over the bytes it must move; the line is the floor."""
    for (kernel, name), (label, colour, marker) in SERIES.items():
        rows = shown(frame, kernel, name)
        if not rows.empty:
            ax.scatter(rows["bytes"] / 1e6, rows["median_us"], s=14, c=colour, marker=marker, linewidths=0.8,
                       label=label)
    floor = frame.sort_values("bytes")
    ax.plot(floor["bytes"] / 1e6, floor["floor_us"], color="black", linewidth=0.7, label="floor: plain read")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("MB moved by one decode step of one layer", fontsize=7)


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
    for (kernel, name), (label, colour, marker) in SERIES.items():
        rows = shown(frame, kernel, name).sort_values("context")
        if (kernel, name) != BASELINE and not rows.empty:
            ax.plot(rows["context"], rows["speedup"], color=colour, marker=marker, markersize=3, linewidth=0.8,
                    label=label)
    ax.axhline(1, color="black", linewidth=0.6, linestyle="--")
    ax.set_xscale("log", base=2)
    ax.set_xticks(contexts, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in contexts])
    ax.minorticks_off()


def roofline(frame: "pd.DataFrame") -> "Figure":
    import matplotlib.pyplot as plt

    shapes = list(frame.groupby(SHAPE))
    figure, axes = plt.subplots(1, len(shapes), figsize=(1 + 2.7 * len(shapes), 3.4), sharey=True, squeeze=False,
                                layout="constrained")
    for ax, (shape, rows) in zip(axes[0], shapes, strict=True):
        draw_roofline(ax, rows)
        ax.set_title(_title(shape), fontsize=8)
        ax.tick_params(labelsize=7)
    axes[0, 0].set_ylabel("us a layer, median", fontsize=7)
    axes[0, -1].legend(fontsize=5)
    figure.suptitle(frame["gpu"].iloc[0], fontsize=8)
    return figure


def speedup(frame: "pd.DataFrame") -> "Figure":
    import matplotlib.pyplot as plt

    frame = speedups(frame)
    shapes, batches = list(frame.groupby(SHAPE)), sorted(frame["batch"].unique())
    figure, axes = plt.subplots(len(shapes), len(batches), figsize=(1 + 1.9 * len(batches), 0.8 + 1.7 * len(shapes)),
                                sharex=True, sharey=True, squeeze=False, layout="constrained")
    for line, (shape, rows) in zip(axes, shapes, strict=True):
        for ax, batch in zip(line, batches, strict=True):
            part = rows[rows["batch"] == batch]
            if part.empty:
                ax.set_axis_off()
                continue
            draw_speedup(ax, part, sorted(frame["context"].unique()))
            ax.set_title(f"{_title(shape)}, batch {batch}", fontsize=7)
            ax.tick_params(labelsize=6, labelbottom=True)
        line[0].set_ylabel("times as fast", fontsize=7)
    for ax in axes[-1]:
        ax.set_xlabel("context, tokens", fontsize=7)
    handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=6, loc="outside lower center", ncols=len(handles))
    figure.suptitle(f"Decode attention over FlashInfer in bf16, {frame['gpu'].iloc[0]}", fontsize=8)
    return figure


def _title(shape: tuple[int, int, int]) -> str:
    return "/".join(map(str, shape))


def write_figures(table: Path) -> list[Path]:
    """<gpu>_roofline and <gpu>_speedup, .pdf and .png, beside <gpu>.csv; raises UserError if it mixes machines."""
    import matplotlib as mpl
    import pandas as pd

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    frame = pd.read_csv(table)
    for column in ("gpu", "commit"):
        if frame[column].nunique() != 1:
            raise UserError(f"{table} mixes values of {column} ({', '.join(map(str, frame[column].unique()))}): "
                            "a figure shows one run.")
    paths = []
    for name, figure in (("roofline", roofline(frame)), ("speedup", speedup(frame))):
        for suffix, metadata in ((".pdf", {"CreationDate": None}), (".png", {"Software": None})):
            paths.append(table.with_name(f"{table.stem}_{name}{suffix}"))
            figure.savefig(paths[-1], metadata=metadata, dpi=200)
        plt.close(figure)
    return paths
