"""Which published runs a command repeats: those whose configuration one of its jobs composes to."""

import json
import shlex
from collections.abc import Iterable
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from kvtuner_sglang import command_line
from kvtuner_sglang.config import decisive
from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.record import RECORD_FILE, RunRecord, load_record
from kvtuner_sglang.paper.published_folders import PUBLISHED

RUN = ["python", "run.py"]
RECIPES = ["python", "-m", "kvtuner_sglang.quality.recipe_search"]
MULTIRUN = "-m"


def repeated(command: str, root: Path) -> list[str]:
    """The runs and recipe files of runs/published that a command makes anew, as <folder>/<name>.

    Raises UserError if the command can leave neither.
    """
    words = shlex.split(command)
    if words[:3] == RECIPES:
        return [str(path.relative_to(root / PUBLISHED)) for path in (root / PUBLISHED).glob(f"*/{_out(words)}")]
    composed = jobs(command, (root / "conf").resolve())
    return [run for run in published_runs(root) if any(agree(of_record(_record(run, root)), job) for job in composed)]


def published_runs(root: Path) -> list[str]:
    """Every run of runs/published, as <folder>/<name>, by name."""
    folder = root / PUBLISHED
    return sorted(str(path.parent.relative_to(folder)) for path in folder.glob(f"*/*/{RECORD_FILE}"))


@cache
def jobs(command: str, conf: Path) -> list[dict[str, Any]]:
    """What is compared of every job of a command of run.py. Without a device it takes a GPU, which is where it runs."""
    words = shlex.split(command)
    if words[:2] != RUN:
        raise UserError(f"{command} is no command of run.py or of recipe_search, which alone leave what is published.")
    overrides = [word for word in words[2:] if word != MULTIRUN]
    with command_line.apart_from_the_running_job():
        return [compared(command_line.load(job, conf).to_dict(), auto="cuda")
                for job in command_line.jobs(overrides, conf, multirun=MULTIRUN in words)]


def of_record(record: RunRecord) -> dict[str, Any]:
    """What is compared of a finished run, with the device that it found."""
    return compared(record.config, auto=record.environment.auto_device)


def compared(config: dict[str, Any], auto: str) -> dict[str, Any]:
    """What names a run's folder by its hash, but for where a model lies; `auto` is what the device auto stands for."""
    kept = json.loads(json.dumps(decisive(config)))
    kept.get("model", {}).pop("path", None)
    for devices in (kept, kept.get("server", {})):
        if devices.get("device") == "auto":
            devices["device"] = auto
    return kept


def agree(one: Any, other: Any) -> bool:
    """Equal in everything that both have: options that came later were not there to be set."""
    if isinstance(one, dict) and isinstance(other, dict):
        return all(agree(one[name], other[name]) for name in one.keys() & other.keys())
    return bool(one == other)


def hardware(source: str, root: Path) -> str:
    """Where a published run or recipe file was made, by its own word."""
    path = root / PUBLISHED / source
    if path.is_dir():
        return _record(source, root).environment.hardware
    device = str(json.loads(path.read_text(encoding="utf-8"))["device"])
    return "a CPU" if device == "cpu" else device


def minutes(sources: Iterable[str], root: Path) -> float | None:
    """What published runs took, each counted once, by their own records; None if there is no run among them."""
    records = [_record(run, root) for run in sorted(set(sources)) if (root / PUBLISHED / run).is_dir()]
    seconds = [(datetime.fromisoformat(r.ended) - datetime.fromisoformat(r.started)).total_seconds() for r in records]
    return sum(seconds) / 60 if seconds else None


def _record(run: str, root: Path) -> RunRecord:
    path = root / PUBLISHED / run
    return _read(path, (path / RECORD_FILE).stat().st_mtime_ns)


@cache
def _read(run_dir: Path, changed: int) -> RunRecord:
    return load_record(run_dir)


def _out(words: list[str]) -> str:
    try:
        return words[words.index("--out") + 1]
    except (ValueError, IndexError) as error:
        raise UserError(f"{shlex.join(words)} has no --out: name the published file that it repeats.") from error
