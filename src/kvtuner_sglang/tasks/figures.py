"""task=figures: draw every figure of the paper from runs/published; leaves no record."""

from collections.abc import Callable
from pathlib import Path

from kvtuner_sglang.evidence.environment import PROJECT_ROOT
from kvtuner_sglang.evidence.outcome import Outcome
from kvtuner_sglang.paper.drawing import FIGURES, draw_figures

Say = Callable[[str], None]


def run(say: Say, root: Path = PROJECT_ROOT) -> Outcome:
    """Write root/paper/figures; the same published files give the same bytes."""
    for path in draw_figures(root, root / FIGURES):
        say(f"  {path}")
    return Outcome(None, "ok", skipped=False, reason=None)
