"""Where the paper's sources are, and how tests break a copy of them on purpose."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
QUALITY = Path("runs/published/quality")


def replace(path: Path, old: str, new: str) -> None:
    """Exchange the first `old` of a file, which must be there."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
