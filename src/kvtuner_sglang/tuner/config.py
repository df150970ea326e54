"""What the tune task searches and with how much text."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.quant.format import CHANNEL_PAGE_SIZES

BLOCK_TOKENS = 100  # of quality.compare, which this file must not import: it takes seconds
# Positions of a window before this one count nowhere: in formats with the largest pages they read nothing stored, so
# that a mean over them would favour those.
FIRST_COUNTED = CHANNEL_PAGE_SIZES[-1]
PositiveInt = Annotated[int, Field(gt=0)]
Word = Annotated[str, BeforeValidator(str), Field(pattern="^(2|4|8)[bs]?$")]  # a command line's [4,8] are numbers


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TuneConfig:
    """bits: the budget, mean effective bits.  keys, values: what a layer may choose from, see menu.py.

    calibration_*: tokens of prose that the search scores plans on, in windows.  cluster_eps: RMS distance of log10
    errors below which layers count as alike.  candidates: plans that the search scores; population: of a generation.
    heldout_*, recall_items: what plans are compared on in the end.  front_plans: how many of the front at most.

    KL is the mean over positions from FIRST_COUNTED on of every window, on calibration and on held-out text alike.
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
        for text in ("calibration", "heldout"):
            tokens, window = getattr(self, f"{text}_tokens"), getattr(self, f"{text}_window")
            if window < 2 * FIRST_COUNTED or tokens % window:
                raise ConfigError(f"tune.{text}_window={window} does not fit: give at least two pages of "
                                  f"{FIRST_COUNTED}, and whole windows in tune.{text}_tokens={tokens}.")
        counted = self.heldout_tokens // self.heldout_window * (self.heldout_window - FIRST_COUNTED)
        if counted < 2 * BLOCK_TOKENS:
            raise ConfigError(f"tune.heldout_tokens={self.heldout_tokens} leaves {counted} positions, too few for a "
                              f"standard error: give {2 * BLOCK_TOKENS} or more behind the first {FIRST_COUNTED} of "
                              "every window.")
        for name, words in (("keys", self.keys), ("values", self.values)):
            if len(set(words)) < len(words):
                raise ConfigError(f"tune.{name}=[{', '.join(words)}] offers a format twice: name each once.")
        for word in {*self.keys} - {"4b"} | {*self.values}:
            if word.endswith("b"):
                raise ConfigError(f"tune has the format {word}, but only keys of 4 bits can be boosted: write 4b among "
                                  "tune.keys, and b nowhere else.")
