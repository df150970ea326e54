"""paper/claims.yaml: what is claimed, in sentences whose every number is read from a published table or record."""

import csv
import json
from decimal import ROUND_HALF_UP, Decimal, localcontext
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.paper.published_folders import PUBLISHED

CLAIMS_FILE = Path("paper") / "claims.yaml"  # under the project's root
TierName = Literal["laptop", "gpu", "sweep"]
Selection = dict[str, str | int | float]
FLOOR = "tpot_floor_ms"  # of tables that have it: tells two machines of a kind apart (RunRecord.measured_apart)
SAME_FLOOR = ("model", "dist")  # what must be equal for floors to tell that
TIMED = ("_ms", "_s")    # how columns end whose values depend on the machine, not on the format alone


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Cell(Strict):
    """One cell of a table: the only row whose columns equal `where`, and its `column`."""

    where: Selection
    column: str


class Number(Strict):
    """One number of a sentence, from a cell of `csv` or from `record` along `path`; both under runs/published.

    over: another cell of the same table to divide by; `where` names only what differs.  show: how Python's format()
    writes it.  band: what a repetition has to fall into for the sentence to stand.
    """

    csv: str | None = None
    where: Selection = Field(default_factory=dict)
    column: str | None = None
    over: Cell | None = None
    record: str | None = None
    path: tuple[str | int, ...] = ()
    show: str
    band: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.csv is None) == (self.record is None):
            raise ValueError("a number is read from a csv or from a record: give one of them")
        if self.csv and not (self.column and self.where):
            raise ValueError("a csv needs where and column")
        if self.record and (not self.path or self.where or self.column or self.over):
            raise ValueError("a record needs a path, and no where, column or over")
        return self

    @property
    def file(self) -> str:
        return self.csv or self.record or ""

    def read(self, root: Path) -> float:
        """The number as it is published; raises UserError if it is not there, there twice, or of two machines."""
        path = root / PUBLISHED / self.file
        if self.record:
            return _at(path, self.path)
        value = _cell(path, self.where, self.column or "")
        if self.over is None:
            return value
        other = {**self.where, **self.over.where}
        if self.over.column.endswith(TIMED) and _machines_differ(_row(path, self.where), _row(path, other)):
            raise UserError(f"{path}: the rows with {self.where} and {other} differ in {FLOOR}, so they are of two "
                            "machines of a kind and a ratio of their times says nothing: repeat both on one.")
        return value / _cell(path, other, self.over.column)

    def sources(self, root: Path) -> set[str]:
        """The published runs, or recipe files, that the rows were made from, as <folder>/<name>."""
        if self.record:
            return {str(Path(self.record).parent)}
        selected = [self.where, *([{**self.where, **self.over.where}] if self.over else [])]
        path = root / PUBLISHED / self.file
        # the table of one run has no column for it, but its name
        return {f"{Path(self.file).parent}/{_row(path, where).get('run', path.stem)}" for where in selected}

    def text(self, value: float) -> str:
        return written(value, self.show)


class Claim(Strict):
    """One sentence with {names} of its numbers, and how to repeat what it says.

    commands: between them they make every published run and recipe file anew that a number is read from.
    headline: it is in the README; loses: it is there, under where a format loses.
    """

    id: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    sentence: str
    numbers: dict[str, Number] = Field(min_length=1)
    commands: tuple[str, ...] = Field(min_length=1)
    tier: TierName
    headline: bool = False
    loses: bool = False

    @model_validator(mode="after")
    def _says_its_numbers(self) -> Self:
        if not any(number.band for number in self.numbers.values()):
            raise ValueError("no number has a band, so nothing can contradict the claim")
        if unsaid := [name for name in self.numbers if f"{{{name}}}" not in self.sentence]:
            raise ValueError(f"the sentence does not say {', '.join(unsaid)}")
        if len({number.file.split("/")[0] for number in self.numbers.values()}) > 1:
            raise ValueError("its numbers are from several published folders: make a claim for each")
        return self

    @property
    def folder(self) -> str:
        """The published folder that its numbers are from."""
        return next(iter(self.numbers.values())).file.split("/")[0]

    def sources(self, root: Path) -> list[str]:
        """The published runs and recipe files that it rests on, as <folder>/<name>, by name."""
        return sorted(set().union(*(number.sources(root) for number in self.numbers.values())))

    def values(self, root: Path) -> dict[str, float]:
        return {name: number.read(root) for name, number in self.numbers.items()}

    def said(self, values: dict[str, float]) -> str:
        """The sentence with its numbers in it; raises UserError if it names a number that it does not have."""
        texts = {name: self.numbers[name].text(value) for name, value in values.items()}
        try:
            return self.sentence.format(**texts)
        except (KeyError, IndexError) as error:
            raise UserError(f"claim {self.id} says {{{error.args[0]}}}, which is no number of it: add one.") from error


class Tier(Strict):
    """One kind of repetition. where: on what machines.  commands: of a tier without claims.

    all_claims: it repeats every claim, not its own alone.
    """

    title: str
    where: str
    what: str
    all_claims: bool = False
    commands: tuple[str, ...] = ()


class Claims(Strict):
    tiers: dict[TierName, Tier]
    claims: tuple[Claim, ...]

    def commands(self, tier: TierName) -> list[str]:
        """Its own, then those of the claims that it repeats, each once, in their order."""
        repeats = [claim for claim in self.claims if self.tiers[tier].all_claims or claim.tier == tier]
        theirs = (command for claim in repeats for command in claim.commands)
        return list(dict.fromkeys([*self.tiers[tier].commands, *theirs]))

    @model_validator(mode="after")
    def _ids_are_unique(self) -> Self:
        ids = [claim.id for claim in self.claims]
        if twice := sorted({name for name in ids if ids.count(name) > 1}):
            raise ValueError(f"two claims are called {', '.join(twice)}")
        return self


def written(value: float, show: str) -> str:
    """A number as Python's format() writes it, but halves rounded up as typst does, and with a true minus sign."""
    with localcontext(rounding=ROUND_HALF_UP):
        return format(Decimal(repr(value)), show).replace("-", "\N{MINUS SIGN}")


def load_claims(root: Path) -> Claims:
    """Read root/paper/claims.yaml; raises UserError, one sentence, if it is not what Claims describes."""
    path = root / CLAIMS_FILE
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}): it must be YAML.") from error
    try:
        return Claims.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from error


def _cell(path: Path, where: Selection, column: str) -> float:
    try:
        return float(_row(path, where)[column])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} has no number in column {column} of the row with {where}.") from error


def _row(path: Path, where: Selection) -> dict[str, str]:
    rows = [row for row in _rows(path) if all(_equal(row.get(name), value) for name, value in where.items())]
    if len(rows) != 1:
        raise UserError(f"{path} has {len(rows)} rows with {where}: a number is read from exactly one.")
    return rows[0]


def _machines_differ(one: dict[str, str], other: dict[str, str]) -> bool:
    """By the floors of two rows of one model and layout, where both are known."""
    alike = all(one.get(name) == other.get(name) for name in SAME_FLOOR)
    return alike and bool(one.get(FLOOR) and other.get(FLOOR)) and one[FLOOR] != other[FLOOR]


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{path} cannot be read: publish it, or take out the claims that rest on it.") from error


def _equal(cell: str | None, value: str | float) -> bool:
    if cell is None or isinstance(value, str):
        return cell == value
    try:
        return float(cell) == value
    except ValueError:
        return False


def _at(path: Path, keys: tuple[str | int, ...]) -> float:
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        for key in keys:
            found = found[key]
        return float(found)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{path} has no number at {' '.join(map(str, keys))}.") from error
