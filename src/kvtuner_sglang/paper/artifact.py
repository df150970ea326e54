"""ARTIFACT.md: how to check and how to repeat every claim, made from paper/claims.yaml and the published records."""

from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path

from kvtuner_sglang.evidence.record import load_record, write_atomically
from kvtuner_sglang.evidence.sweep import markdown_table
from kvtuner_sglang.paper.claims import CLAIMS_FILE, Claim, Claims, Number, Tier, TierName
from kvtuner_sglang.paper.published_folders import PUBLISHED

ARTIFACT_FILE = Path("ARTIFACT.md")  # under the project's root
HEAD = f"""# Artifact

Made by `python run.py task=paper` from [{CLAIMS_FILE}]({CLAIMS_FILE}) and [runs/published]({PUBLISHED}); do not edit.
`python` is `.venv/bin/python` after `make setup` (2 to 4 minutes, 3.5 GB). A claim stands if a repetition's numbers are
in the bands given with it. CHECKPOINT is a checkpoint's folder: runs/published/*/README.md says which."""


def artifact_text(claims: Claims, root: Path) -> str:
    parts = [HEAD, *(part for name in claims.tiers for part in _tier(name, claims, root))]
    rows = [(f"[{claim.id}](#{claim.id})", claim.said(claim.values(root)), claims.tiers[claim.tier].title)
            for claim in claims.claims]
    parts += ["## Claims", markdown_table(("claim", "sentence", "tier"), rows)]
    for claim in claims.claims:
        parts += _claim(claim, claims.tiers[claim.tier], root)
    return "\n\n".join(parts) + "\n"


def write_artifact(claims: Claims, root: Path) -> Path:
    path = root / ARTIFACT_FILE
    write_atomically(path, artifact_text(claims, root))
    return path


def minutes(runs: Iterable[str], root: Path) -> float:
    """What published runs took, each counted once, by their own records."""
    records = [load_record(root / PUBLISHED / run) for run in sorted(set(runs))]
    seconds = [(datetime.fromisoformat(r.ended) - datetime.fromisoformat(r.started)).total_seconds() for r in records]
    return sum(seconds) / 60


def _tier(name: TierName, claims: Claims, root: Path) -> Iterator[str]:
    tier = claims.tiers[name]
    runs = [run for claim in claims.claims if tier.all_claims or claim.tier == name for run in claim.runs]
    yield f"## {tier.title}"
    yield f"On {tier.hardware}. It {tier.what}." + (
        f" The published runs took {minutes(runs, root):.0f} minutes by their records." if runs else "")
    yield "```\n" + "\n".join(tier.commands) + "\n```"


def _claim(claim: Claim, tier: Tier, root: Path) -> Iterator[str]:
    took = f"{minutes(claim.runs, root):.0f} minutes" if claim.runs else "time not recorded"
    values = claim.values(root)
    yield f"### {claim.id}"
    yield claim.said(values)
    rows = [(name, number.text(values[name]), _band(number), f"`{_source(number)}`")
            for name, number in claim.numbers.items()]
    yield markdown_table(("number", "published", "band", "read from"), rows)
    yield (f"{claim.hardware}; {took}; tier: {tier.title}. "
           f"Rests on {', '.join(f'`{word}`' for word in (*claim.runs, *claim.files))}.")
    yield f"```\n{claim.command}\n```"


def _band(number: Number) -> str:
    return f"{number.band[0]:g} to {number.band[1]:g}" if number.band else ""


def _source(number: Number) -> str:
    if number.record:
        return f"{number.record}: {' '.join(map(str, number.path))}"
    where = " ".join(f"{name}={value}" for name, value in number.where.items())
    source = f"{number.csv}: {number.column} where {where}"
    if number.over:
        other = " ".join(f"{name}={value}" for name, value in number.over.where.items())
        source += f", over {number.over.column} where {other}"
    return source
