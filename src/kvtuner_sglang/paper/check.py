"""Does everything that is claimed still follow from runs/published?

Of every published folder: its checksums cover every file and hold, its records are whole runs that ended ok, and its
tables are those that the records give.  Of every claim: its numbers are there, each in its band, the runs it rests on
are published, and its command composes to what they were run with.
"""

import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from kvtuner_sglang import command_line
from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.published import SUMS_FILE, publishable
from kvtuner_sglang.evidence.record import RECORD_FILE, file_sha256, load_record
from kvtuner_sglang.paper.claims import Claim, Claims
from kvtuner_sglang.paper.published_folders import FOLDERS, PUBLISHED, PublishedFolder

RUN = ["python", "run.py"]
MULTIRUN = "-m"
# what a run depends on; its place, its mirror and the other tasks' settings say nothing about its figures
COMPARED = ("task", "quant", "dist", "seed")
LOADS = {"quality": "quality", "speed": "speed", "kernels": "kernels"}  # and workload for the others


def folder_problems(folder: Path) -> Iterator[str]:
    """What is wrong with one published folder, a sentence each."""
    yield from _sum_problems(folder)
    for path in sorted(folder.rglob(RECORD_FILE)):
        try:
            publishable(path.parent, load_record(path.parent).config["task"])
        except UserError as error:
            yield str(error)
    kind = FOLDERS.get(folder.name, PublishedFolder())
    try:
        made = kind.make_tables(folder)
    except UserError as error:
        yield str(error)
        return
    for name in sorted(made.keys() | ({path.name for path in folder.glob("*.csv")} if kind.tables else set())):
        path = folder / name
        if name not in made or not path.exists() or path.read_text(encoding="utf-8") != made[name]:
            yield f"{path} is not the table that the records beside it give: publish it again."


def _sum_problems(folder: Path) -> Iterator[str]:
    path = folder / SUMS_FILE
    if not path.exists():
        yield f"{folder} has no {SUMS_FILE}: publish it again."
        return
    listed = {name: digest for digest, name in (line.split(maxsplit=1) for line in path.read_text().splitlines())}
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} - {SUMS_FILE}
    for name in sorted(files ^ listed.keys()):
        yield f"{folder / name} is {'not listed in' if name in files else 'listed, yet missing, in'} {SUMS_FILE}."
    for name in sorted(files & listed.keys()):
        if file_sha256(folder / name) != listed[name]:
            yield f"{folder / name} is not the file that {SUMS_FILE} lists."


def claim_problems(claim: Claim, root: Path) -> Iterator[str]:
    """What is wrong with one claim, a sentence each."""
    try:
        values = claim.values(root)
        claim.said(values)
    except UserError as error:
        yield f"claim {claim.id}: {error}"
        return
    for name, number in claim.numbers.items():
        if number.band and not number.band[0] <= values[name] <= number.band[1]:
            yield (f"claim {claim.id}: {name} is {values[name]:.6g}, outside of its band from {number.band[0]:g} to "
                   f"{number.band[1]:g}.")
    for word in (*claim.runs, *claim.files):
        if not (root / PUBLISHED / word).exists():
            yield f"claim {claim.id}: {word} is not published."
    if claim.runs:
        try:
            yield from _command_problems(claim, root)
        except UserError as error:
            yield f"claim {claim.id}: {error}"


def _command_problems(claim: Claim, root: Path) -> Iterator[str]:
    """A run that no job of the claim's command would repeat."""
    jobs = _configurations(claim.command, (root / "conf").resolve())
    for run in claim.runs:
        config = _compared(load_record(root / PUBLISHED / run).config)
        if not any(_agree(config, job) for job in jobs):
            yield f"claim {claim.id}: its command repeats no run configured as {run} was."


@cache
def _configurations(command: str, conf: Path) -> list[dict[str, Any]]:
    words = shlex.split(command)
    if words[:2] != RUN:
        raise UserError(f"{command} is no command of run.py, which alone leaves runs.")
    overrides = [word for word in words[2:] if word != MULTIRUN]
    with command_line.apart_from_the_running_job():
        return [_compared(command_line.load(job, conf).to_dict())
                for job in command_line.jobs(overrides, conf, multirun=MULTIRUN in words)]


def _compared(config: dict[str, Any]) -> dict[str, Any]:
    task = config["task"]
    kept = {name: config[name] for name in (*COMPARED, LOADS.get(task, "workload"))}
    if task == "kernels":
        return {name: kept[name] for name in ("task", "kernels", "seed")}
    return kept | {"model": config["model"]["name"]}


def _agree(one: Any, other: Any) -> bool:
    """Equal in everything that both have: options that came later were not there to be set."""
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_agree(one[name], other[name]) for name in one.keys() & other.keys())
    return bool(one == other)


def problems(claims: Claims, folders: list[Path], root: Path) -> Iterator[str]:
    """Everything that is wrong, a sentence each; nothing if all holds."""
    for folder in folders:
        yield from folder_problems(folder)
        if not any(claim.folder == folder.name for claim in claims.claims):
            yield f"{folder} is published, but no claim rests on it: write one in paper/claims.yaml."
    for claim in claims.claims:
        yield from claim_problems(claim, root)
