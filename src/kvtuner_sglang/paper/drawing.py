"""Every figure of the paper from runs/published alone, into paper/figures: no GPU, no network, seconds."""

from pathlib import Path

from kvtuner_sglang.figure_style import SUFFIXES, save
from kvtuner_sglang.paper.published_folders import FOLDERS, PublishedFolder, published_folders

FIGURES = Path("paper") / "figures"  # under the project's root


def draw_figures(root: Path, into: Path) -> list[Path]:
    """Draw all into the folder `into`, as <published folder>_<name>.pdf and .png; removes figures of what is gone."""
    into.mkdir(parents=True, exist_ok=True)
    written = []
    for folder in published_folders(root):
        for name, figure in FOLDERS.get(folder.name, PublishedFolder()).draw(folder).items():
            written += save(figure, into, f"{folder.name}_{name}")
    for stale in set(into.iterdir()) - set(written):
        if stale.suffix in SUFFIXES:
            stale.unlink()
    return written
