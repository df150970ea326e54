"""What the tune task searches and with how much text."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from kvtuner_sglang.errors import ConfigError

BLOCK_TOKENS = 100  # of quality.compare, which this file must not import: it takes seconds
PositiveInt = Annotated[int, Field(gt=0)]
Word = Annotated[str, Field(pattern="^(2|4|8)[bs]?$")]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TuneConfig:
    """bits: the budget, mean effective bits.  keys, values: what a layer may choose from, see menu.py.

    calibration_*: tokens of prose that the search scores plans on, in windows.  cluster_eps: RMS distance of log10
    errors below which layers count as alike.  candidates: plans that the search scores; population: of a generation.
    heldout_*, recall_items: what plans are compared on in the end.  front_plans: how many of the front at most.
    """

    name: str
    bits: Annotated[float, Field(gt=0, le=16)]
    page_size: Literal[64, 128]
    keys: Annotated[tuple[Word, ...], Field(min_length=1)]
    values: Annotated[tuple[Word, ...], Field(min_length=1)]
    calibration_tokens: PositiveInt
    calibration_window: PositiveInt
    cluster_eps: Annotated[float, Field(gt=0)]
    population: Annotated[int, Field(ge=2)]
    candidates: PositiveInt
    heldout_tokens: PositiveInt
    heldout_window: PositiveInt
    recall_items: PositiveInt
    recall_batch: PositiveInt
    front_plans: PositiveInt
    random_plans: PositiveInt
    uniform_tolerance_bits: Annotated[float, Field(ge=0)]

    def __post_init__(self) -> None:
        if self.calibration_window < 2 * self.page_size or self.calibration_tokens % self.calibration_window:
            raise ConfigError(f"tune.calibration_window={self.calibration_window} does not fit: give at least two "
                              f"pages of {self.page_size}, and whole windows in tune.calibration_tokens="
                              f"{self.calibration_tokens}.")
        if self.heldout_tokens < 2 * BLOCK_TOKENS:
            raise ConfigError(f"tune.heldout_tokens={self.heldout_tokens} is too little for a standard error: give "
                              f"{2 * BLOCK_TOKENS} or more.")
        for word in {*self.keys} - {"4b"} | {*self.values}:
            if word.endswith("b"):
                raise ConfigError(f"tune has the format {word}, but only keys of 4 bits can be boosted: write 4b among "
                                  "tune.keys, and b nowhere else.")
