"""paper/main.typ -> paper/main.pdf, with every number handed in from the claims; typst reads the tables itself."""

import json
from pathlib import Path
from typing import Any

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.paper.claims import Claims
from kvtuner_sglang.paper.drawing import FIGURES
from kvtuner_sglang.paper.published_folders import published_folders

SOURCE = Path("paper") / "main.typ"  # under the project's root
SECTIONS = Path("paper") / "sections"
PDF = Path("paper") / "main.pdf"


def paper_data(claims: Claims, root: Path) -> dict[str, Any]:
    """What main.typ reads: which folders, sections and figures there are, and every claim's sentence and numbers."""
    return {
        "folders": [folder.name for folder in published_folders(root)],
        "sections": sorted(path.stem for path in (root / SECTIONS).glob("*.typ")),
        "figures": sorted(path.stem for path in (root / FIGURES).glob("*.pdf")),
        "claims": {claim.id: {
            "folder": claim.folder, "sentence": claim.said(values := claim.values(root)),
            "numbers": {name: claim.numbers[name].text(value) for name, value in values.items()},
        } for claim in claims.claims},
    }


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
