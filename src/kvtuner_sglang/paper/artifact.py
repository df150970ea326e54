"""ARTIFACT.md: how to check and how to repeat every claim, made from paper/claims.yaml and the published records."""

from collections.abc import Iterator
from pathlib import Path

from kvtuner_sglang.evidence.record import write_atomically
from kvtuner_sglang.evidence.sweep import markdown_table
from kvtuner_sglang.paper.claims import CLAIMS_FILE, Claim, Claims, Number, Tier, TierName
from kvtuner_sglang.paper.published_folders import PUBLISHED
from kvtuner_sglang.paper.repeat import hardware, jobs, minutes, repeated

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


def _tier(name: TierName, claims: Claims, root: Path) -> Iterator[str]:
    tier = claims.tiers[name]
    commands = claims.commands(name)
    made = [source for command in commands if command not in tier.commands for source in repeated(command, root)]
    took = minutes(made, root)
    yield f"## {tier.title}"
    yield f"On {tier.where}. It {tier.what}." + (
        f" The published runs took {took:.0f} minutes by their records." if took is not None else "")
    lines = [command if command in tier.commands else f"# {_what_it_takes(command, root)}\n{command}"
             for command in commands]
    yield "```\n" + "\n".join(lines) + "\n```"


def _what_it_takes(command: str, root: Path) -> str:
    """The machine, the jobs and the minutes of a command, by the records of what it repeats."""
    made = repeated(command, root)
    where = f"{' and '.join(sorted({hardware(source, root) for source in made}))}: "
    took = minutes(made, root)
    if took is None:
        return f"{where}time not recorded"
    count = len(jobs(command, (root / "conf").resolve()))
    published = f"{count} jobs" if count > 1 else "1 job"
    if len(made) != count:
        published += f", {len(made)} of them published"
    return f"{where}{published}, {took:.0f} min"


def _claim(claim: Claim, tier: Tier, root: Path) -> Iterator[str]:
    sources = claim.sources(root)
    took = minutes(sources, root)
    values = claim.values(root)
    yield f"### {claim.id}"
    yield claim.said(values)
    rows = [(name, number.text(values[name]), _band(number), f"`{_source(number)}`")
            for name, number in claim.numbers.items()]
    yield markdown_table(("number", "published", "band", "read from"), rows)
    where = " and ".join(sorted({hardware(source, root) for source in sources}))
    yield (f"{where}; {'time not recorded' if took is None else f'{took:.0f} min'}; tier: {tier.title}. "
           f"Rests on {', '.join(f'`{source}`' for source in sources)}.")
    yield "```\n" + "\n".join(claim.commands) + "\n```"


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
