"""What one engine process is asked to measure and what it says; all of it travels as JSON."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from kvtuner_sglang.errors import RunFailed

Workload = Literal["decode", "saturation", "ttft", "ttft_cached"]
Kind = Literal["fill", "warmup", "timed"]


@dataclass(frozen=True)
class Cell:
    """One row of the table. batch is null at saturation until the engine's tokens are known.

    context: tokens of each prompt; cached: how many of them the prefix cache must hold.
    """

    workload: Workload
    batch: int | None
    context: int
    cached: int


@dataclass(frozen=True)
class Call:
    """One Engine.generate: what was asked, how long it took and what the engine said about it.

    seconds: wall time from the call to its last answer.  cached_*, prompt_*, output_*: extremes over the requests.
    running, graph: most requests in one decode step, and whether every logged step was a CUDA graph, by the engine's
    log; null where nothing was decoded.
    """

    kind: Kind
    workload: Workload
    round: int
    batch: int
    context: int
    cached: int
    new_tokens: int
    seconds: float
    prompt_min: int
    prompt_max: int
    cached_min: int
    cached_max: int
    output_min: int
    output_max: int
    retractions: int
    running: int | None
    graph: bool | None


@dataclass(frozen=True)
class SpeedSpec:
    """One engine, one format. `engine`: keywords of sglang.Engine; `page_size`: tokens that the cache shares at once.

    new_tokens, warmups, repeats, ttft_repeats: see SpeedConfig.
    """

    engine: dict[str, Any]
    enabled: bool
    device: str
    page_size: int
    vocabulary: int
    seed: int
    cells: list[Cell]
    new_tokens: tuple[int, int]
    warmups: int
    repeats: int
    ttft_repeats: int
    outputs_per_request: int
    log_path: str
    calls_path: str

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(path: Path) -> "SpeedSpec":
        tree = json.loads(path.read_text())
        tree["cells"] = [Cell(**cell) for cell in tree["cells"]]
        tree["new_tokens"] = tuple(tree["new_tokens"])
        return SpeedSpec(**tree)


@dataclass(frozen=True)
class SpeedResult:
    """kvtuner: that part of the engine's server info.  skipped: a sentence for every cell that the pool cannot hold."""

    kvtuner: dict[str, Any]
    seconds: dict[str, float]
    skipped: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(path: Path) -> "SpeedResult":
        try:
            return SpeedResult(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise RunFailed(f"{path} is not a result of this version: run again.") from error


def append_call(path: Path, call: Call) -> None:
    with path.open("a") as file:
        file.write(json.dumps(asdict(call)) + "\n")


def read_calls(path: Path) -> list[Call]:
    """Every call that was made, also of a process that was stopped."""
    if not path.is_file():
        return []
    return [Call(**json.loads(line)) for line in path.read_text().splitlines()]
