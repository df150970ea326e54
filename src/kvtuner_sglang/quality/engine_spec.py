"""What one engine process is asked to measure, and what it answers; both travel as JSON files."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvtuner_sglang.errors import UserError


@dataclass(frozen=True)
class Questions:
    """Prompts and their right answers as token ids, in the same order."""

    prompts: list[list[int]]
    answers: list[list[int]]


@dataclass(frozen=True)
class EngineSpec:
    """One engine, one format.

    plugin: keywords of the plugin, e.g. {"enable_kvtuner_quant": True, "kvtuner_nbits_key": 4, ...}.
    page_size: None leaves it to the plugin.  windows: token ids of prose; each is one ordinary prefill.
    reference_dir: where an engine in full precision left its logits; None makes this engine leave its own in out_dir
    and compare nothing.
    """

    model_path: str
    device: str
    dtype: str
    plugin: dict[str, Any]
    page_size: int | None
    context_length: int
    max_running_requests: int
    chunked_prefill_tokens: int
    seed: int
    windows: list[list[int]]
    questions: dict[str, Questions]
    out_dir: str
    reference_dir: str | None
    port: int

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(path: Path) -> "EngineSpec":
        tree = json.loads(path.read_text())
        tree["questions"] = {name: Questions(**q) for name, q in tree["questions"].items()}
        return EngineSpec(**tree)


@dataclass(frozen=True)
class EngineResult:
    """kvtuner: the part of that name in the engine's server info.

    texts: by question set, in the order of the prompts, the most likely token at every position of the right answer
    and at the one after it, decoded.  rows: per window the lists kl, agree, nll_full, nll (empty for an engine in full
    precision); the last nll of a window is null.
    """

    kvtuner: dict[str, Any]
    texts: dict[str, list[str]]
    rows: list[dict[str, list[float | None]]]
    seconds: dict[str, float] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(path: Path) -> "EngineResult":
        try:
            return EngineResult(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is not a result of this version: delete {path.parent} and run again.") from error


def window_file(folder: Path, number: int) -> Path:
    """Logits of one window, (tokens, vocabulary) fp32."""
    return folder / f"window{number}.npy"
