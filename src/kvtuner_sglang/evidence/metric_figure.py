"""What one run measured at several levels, drawn from its record, such as TTFT over prompt length."""

import re
from collections import defaultdict
from typing import TYPE_CHECKING

from kvtuner_sglang.evidence.record import Metric, RunRecord
from kvtuner_sglang.figure_style import panels, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBER = re.compile(r"\d+(\.\d+)?")
Levels = list[tuple[float, Metric]]


def metric_figure(record: RunRecord) -> "Figure | None":
    """A panel a quantity with its median and range, a line for each of its other labels; None if there is no level.

    Kernels, thousands of cells, are drawn from their table instead.
    """
    families = families_of(record) if record.kv is not None else {}
    if not families:
        return None
    with styled():
        figure, axes = panels(1, len(families), height_in=2.2, width_in=2.2 * len(families), shared=False)
        for ax, ((quantity, label), lines) in zip(axes[0], families.items(), strict=True):
            for name, levels in lines.items():
                at = [level for level, _ in levels]
                ax.plot(at, [metric.p50 for _, metric in levels], marker="o", label=name)
                ax.fill_between(at, [m.min for _, m in levels], [m.max for _, m in levels], alpha=0.2)
            ax.set_title(quantity)
            ax.set_xlabel(label)
            if any(lines):
                ax.legend()
        figure.suptitle(record.name)
    return figure


def families_of(record: RunRecord) -> dict[tuple[str, str], dict[str, Levels]]:
    """{("ttft_ms", "prompt_tokens"): {"": [(10, metric), ...]}}: by quantity and first label, then by other labels.

    What has no first label, or one that is a word, such as a layout's name, is in none.
    """
    families: dict[tuple[str, str], dict[str, Levels]] = defaultdict(lambda: defaultdict(list))
    for key, metric in record.metrics.items():
        quantity, *labels = key.split("/")
        label, _, level = labels[0].partition("=") if labels else ("", "", "")
        if NUMBER.fullmatch(level):
            families[quantity, label][" ".join(labels[1:])].append((float(level), metric))
    return {family: {name: sorted(levels, key=lambda pair: pair[0]) for name, levels in lines.items()}
            for family, lines in families.items()}
