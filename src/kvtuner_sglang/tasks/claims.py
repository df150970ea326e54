"""task=claims: check everything that is claimed against runs/published; leaves no record."""

from collections.abc import Callable
from pathlib import Path

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.environment import PROJECT_ROOT
from kvtuner_sglang.evidence.outcome import Outcome
from kvtuner_sglang.paper.check import problems
from kvtuner_sglang.paper.claims import load_claims
from kvtuner_sglang.paper.published_folders import published_folders

Say = Callable[[str], None]


def run(say: Say, root: Path = PROJECT_ROOT) -> Outcome:
    """Say every claim with its numbers; raises UserError, after naming all that is wrong, if anything is."""
    claims, folders = load_claims(root), published_folders(root)
    wrong = list(problems(claims, folders, root))
    if wrong:
        for sentence in wrong:
            say(f"  wrong  {sentence}")
        raise UserError(f"{len(wrong)} of what is claimed or published {'do' if len(wrong) > 1 else 'does'} not hold: "
                        "see the lines above.")
    for claim in claims.claims:
        say(f"  holds  {claim.id}: {claim.said(claim.values(root))}")
    say(f"  all {len(claims.claims)} claims hold, and what is published is whole: "
        f"{', '.join(folder.name for folder in folders)}")
    return Outcome(None, "ok", skipped=False, reason=None)
