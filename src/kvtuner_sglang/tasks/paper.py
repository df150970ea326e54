"""task=paper: from runs/published to figures, ARTIFACT.md, the README's results and paper/main.pdf; no record."""

from collections.abc import Callable
from pathlib import Path

from kvtuner_sglang.evidence.environment import PROJECT_ROOT
from kvtuner_sglang.evidence.outcome import Outcome
from kvtuner_sglang.paper.artifact import write_artifact
from kvtuner_sglang.paper.claims import load_claims
from kvtuner_sglang.paper.drawing import FIGURES, draw_figures
from kvtuner_sglang.paper.readme import write_results
from kvtuner_sglang.paper.typeset import typeset
from kvtuner_sglang.tasks import claims as check

Say = Callable[[str], None]


def run(say: Say, root: Path = PROJECT_ROOT) -> Outcome:
    """Write all that is made from the claims, once they hold; raises UserError if one does not."""
    check.run(say, root)
    claims = load_claims(root)
    draw_figures(root, root / FIGURES)
    for path in (root / FIGURES, write_artifact(claims, root), write_results(claims, root), typeset(claims, root)):
        say(f"  {path}")
    return Outcome(None, "ok", skipped=False, reason=None)
