"""The folders of runs/published: who makes their tables from their records, and who draws them.

A new folder is a line here, a claim in paper/claims.yaml and, if it is to be seen, a function that draws it.
"""

from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from kvtuner_sglang.evidence.published import SUMS_FILE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WAITING = {"README.md", SUMS_FILE}  # files of a folder without a run
PUBLISHED = Path("runs") / "published"  # under the project's root


@dataclass(frozen=True)
class PublishedFolder:
    """tables: "module:function", folder -> {file name: text that its records give}; figures: folder -> {name: Figure}.

    By name, so that nothing is imported for a folder that is not there; None if it has none.
    """

    tables: str | None = None
    figures: str | None = None

    def make_tables(self, folder: Path) -> dict[str, str]:
        return resolve_name(self.tables)(folder) if self.tables else {}

    def draw(self, folder: Path) -> "dict[str, Figure]":
        return resolve_name(self.figures)(folder) if self.figures else {}


FOLDERS = {
    "quality": PublishedFolder("kvtuner_sglang.quality.summary:tables", "kvtuner_sglang.quality.drawing:figures"),
    "kernels": PublishedFolder("kvtuner_sglang.kernel_bench.publish:tables",
                               "kvtuner_sglang.kernel_bench.figures:figures"),
    "engine": PublishedFolder("kvtuner_sglang.speed.publish:tables", "kvtuner_sglang.speed.decode_figure:figures"),
    "agreement": PublishedFolder("kvtuner_sglang.agreement.publish:tables"),
    "tuner": PublishedFolder("kvtuner_sglang.tuner.publish:tables", "kvtuner_sglang.tuner.figures:figures"),
    "forensics": PublishedFolder("kvtuner_sglang.forensics.publish:tables", "kvtuner_sglang.forensics.figure:figures"),
    "plans": PublishedFolder("kvtuner_sglang.ablation.publish:tables"),
    "load": PublishedFolder("kvtuner_sglang.load.publish:tables"),
    "ablation": PublishedFolder("kvtuner_sglang.ablation.publish:tables", "kvtuner_sglang.ablation.figure:figures"),
}


def published_folders(root: Path) -> list[Path]:
    """The folders that are published under the project's root, by name; one that waits for its first run is not yet."""
    return sorted(path for path in (root / PUBLISHED).iterdir()
                  if path.is_dir() and {file.name for file in path.rglob("*") if file.is_file()} - WAITING)
