"""paper/main.typ -> paper/main.pdf, with every number handed in from the claims; typst reads the tables itself."""

import json
import re
from pathlib import Path
from typing import Any

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.record import load_record
from kvtuner_sglang.paper.claims import Claims
from kvtuner_sglang.paper.drawing import FIGURES
from kvtuner_sglang.paper.published_folders import PUBLISHED, published_folders
from kvtuner_sglang.paper.repeat import published_runs

SOURCE = Path("paper") / "main.typ"  # under the project's root
SECTIONS = Path("paper") / "sections"
PDF = Path("paper") / "main.pdf"


def paper_data(claims: Claims, root: Path) -> dict[str, Any]:
    """What main.typ reads: the folders, sections and figures that there are, rules, claims' sentences and numbers."""
    return {
        "folders": [folder.name for folder in published_folders(root)],
        "sections": sorted(path.stem for path in (root / SECTIONS).glob("*.typ")),
        "rules": rules_by_task(root),
        "figures": sorted(path.stem for path in (root / FIGURES).glob("*.pdf")),
        "claims": {claim.id: {
            "folder": claim.folder, "sentence": claim.said(values := claim.values(root)),
            "numbers": {name: claim.numbers[name].text(value) for name, value in values.items()},
        } for claim in claims.claims},
    }


def rules_by_task(root: Path) -> dict[str, list[str]]:
    """The rules of validity, a sentence each, that held in every published run of a task."""
    held: dict[str, list[str]] = {}
    for run in published_runs(root):
        record = load_record(root / PUBLISHED / run)
        task = record.config["task"]
        held[task] = [rule for rule in held.get(task, record.rules) if rule in record.rules]
    return {task: [_sentence(rule) for rule in held[task]] for task in sorted(held)}


def _sentence(rule: str) -> str:
    """Without the name that some rules have in front."""
    text = re.sub(r"^[a-z0-9_]+: ", "", rule)
    return f"{text[0].upper()}{text[1:].removesuffix('.')}."


def typeset(claims: Claims, root: Path, out: Path | None = None, **options: Any) -> Path:
    """Compile; returns the PDF. Raises UserError with typst's first line if main.typ is wrong.

    Only typst's own fonts are used, and no date is written, so that the same text gives the same bytes.
    """
    import typst

    path = out or root / PDF
    try:
        typst.compile(root / SOURCE, output=path, root=root, ignore_system_fonts=True,
                      sys_inputs={"data": json.dumps(paper_data(claims, root))}, **options)
    except typst.TypstError as error:
        raise UserError(f"{SOURCE} cannot be typeset: {str(error).splitlines()[0]}.") from error
    return path
