"""Layers of a model as people write them: "0", "3-5", "0,3-5", numbered from 0 in the whole model."""

from collections.abc import Sequence

from kvtuner_sglang.errors import ConfigError

MAX_LAYERS = 10_000  # no model has as many


def layer_numbers(text: str) -> list[int]:
    """[0, 3, 4, 5] of "0,3-5"; raises ConfigError if it is not so written."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        if not (first.isdecimal() and (last.isdecimal() if dash else not last)):
            raise ConfigError(f"the plan's layers {text!r} are not numbers: write 0, 3-5 or 0,3-5.")
        if dash and int(last) < int(first):
            raise ConfigError(f"the plan's layers {part.strip()!r} end before they begin: write {last}-{first}.")
        if int(last or first) >= MAX_LAYERS:
            raise ConfigError(f"the plan names layer {last or first}, which no model has: write numbers from 0.")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def layer_text(numbers: Sequence[int]) -> str:
    """ "0,3-5" of [0, 3, 4, 5], which ascend."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
