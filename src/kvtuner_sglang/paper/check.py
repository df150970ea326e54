"""Does everything that is claimed still follow from runs/published?

Of every published folder: its checksums cover every file and hold, its records are whole runs that ended ok and name no
folder of a machine, and its tables are those that the records give.  Of every claim: its numbers are there, each in its
band, and its commands make anew whatever they are read from.
"""

from collections.abc import Iterator
from pathlib import Path

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.machine_paths import has_machine_paths
from kvtuner_sglang.evidence.published import SUMS_FILE, publishable
from kvtuner_sglang.evidence.record import RECORD_FILE, file_sha256, load_record
from kvtuner_sglang.paper.claims import Claim, Claims
from kvtuner_sglang.paper.published_folders import FOLDERS, PublishedFolder
from kvtuner_sglang.paper.repeat import published_runs, repeated


def folder_problems(folder: Path) -> Iterator[str]:
    """What is wrong with one published folder, a sentence each."""
    yield from _sum_problems(folder)
    for path in sorted(path for path in folder.rglob("*.json*") if has_machine_paths(path.read_text(encoding="utf-8"))):
        yield f"{path} names folders of the machine that it was made on: publish it again."
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
    there = {str(path.relative_to(folder)) for pattern in ("*.csv", "*/report.*.md") for path in folder.glob(pattern)}
    for name in sorted(made.keys() | (there if kind.tables else set())):
        path = folder / name
        if name not in made or not path.exists() or path.read_text(encoding="utf-8") != made[name]:
            yield f"{path} is not the table that the records beside it give: publish it again."


def _sum_problems(folder: Path) -> Iterator[str]:
    path = folder / SUMS_FILE
    if not path.exists():
        yield f"{folder} has no {SUMS_FILE}: publish it again."
        return
    lines = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    if any(len(words) != len(("digest", "name")) for words in lines):
        yield f"{path} has a line that is no checksum with a file's name: publish it again."
        return
    listed = {name: digest for digest, name in lines}
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
    try:
        yield from _command_problems(claim, root)
    except UserError as error:
        yield f"claim {claim.id}: {error}"


def _command_problems(claim: Claim, root: Path) -> Iterator[str]:
    """What its numbers are read from, yet no command repeats; a command that repeats nothing of it."""
    sources = set(claim.sources(root))
    made = {command: set(repeated(command, root)) for command in claim.commands}
    for source in sorted(sources.difference(*made.values())):
        yield f"claim {claim.id}: its commands repeat no run configured as {source} was."
    for command in claim.commands:
        if not made[command] & sources:
            yield f"claim {claim.id}: nothing that it rests on is repeated by {command}."


def problems(claims: Claims, folders: list[Path], root: Path) -> Iterator[str]:
    """Everything that is wrong, a sentence each; nothing if all holds."""
    for folder in folders:
        yield from folder_problems(folder)
        if not any(claim.folder == folder.name for claim in claims.claims):
            yield f"{folder} is published, but no claim rests on it: write one in paper/claims.yaml."
    for claim in claims.claims:
        yield from claim_problems(claim, root)
    yield from _unrepeated(claims, root)


def _unrepeated(claims: Claims, root: Path) -> Iterator[str]:
    """Published runs that no command of any claim repeats."""
    try:
        made = {run for command in claims.commands("sweep") for run in repeated(command, root)}
    except UserError:
        return  # said of the claim that has the command
    for run in published_runs(root):
        if run not in made:
            yield f"{run} is published, but no claim's command repeats it: add one in paper/claims.yaml."
