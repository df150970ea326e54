"""Scores by name in a file, written as soon as they are known: a search that was killed repeats none of them."""

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from kvtuner_sglang.quality import compare, prose, recall, recipe, transformers_path
from kvtuner_sglang.quant import format as quant_format
from kvtuner_sglang.tuner import config, held_out, menu, scoring
from kvtuner_triton import reference

T = TypeVar("T")
SCORED_BY: tuple[ModuleType, ...] = (scoring, held_out, config, menu, quant_format, transformers_path, recipe, compare,
                                     prose, recall, reference)


class ScoreBook:
    """A JSON-lines file of {"name": ..., "score": ...}; several processes may append to it.

    used: names that were asked for, and whether the file had their score before this process computed it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.used: dict[str, bool] = {}
        self.scores: dict[str, object] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # a line that a killed process did not finish
            self.scores[entry["name"]] = entry["score"]
        if text and not text.endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def get(self, name: str, score: Callable[[], T]) -> T:
        """The score of this name; calls `score` if there is none yet. A score is what JSON can hold."""
        self.used.setdefault(name, name in self.scores)
        if name not in self.scores:
            found = score()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"name": name, "score": found}) + "\n")
            self.scores[name] = found
        return self.scores[name]  # type: ignore[return-value]

    @property
    def reused(self) -> int:
        """How many of the scores that were asked for another process had left in the file."""
        return sum(self.used.values())


def fingerprint(modules: Sequence[ModuleType], *parts: object) -> str:
    """Twelve hex digits of what a result depends on: `parts`, and the source of the modules that compute it."""
    sources = [inspect.getsource(module) for module in modules]
    return hashlib.sha256(json.dumps([sources, [str(part) for part in parts]]).encode()).hexdigest()[:12]
