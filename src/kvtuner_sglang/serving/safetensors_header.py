"""What the headers of a checkpoint's safetensors files say, without loading a weight (or torch)."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtuner_sglang.errors import UserError

DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"}


@dataclass(frozen=True)
class WeightSummary:
    """The weight files by name, the number of elements in them and the dtype that most of these have."""

    files: tuple[Path, ...]
    parameters: int
    dtype_name: str


def weight_summary(folder: Path) -> WeightSummary:
    """Reads every header in `folder`; raises UserError if weights are missing or cut off."""
    files = _weight_files(folder)
    elements: Counter[str] = Counter()
    for file in files:
        for tensor in read_header(file).values():
            elements[tensor["dtype"]] += math.prod(tensor["shape"])
    (most, _) = elements.most_common(1)[0]
    return WeightSummary(files, elements.total(), DTYPE_NAMES.get(most, most.lower()))


def _weight_files(folder: Path) -> tuple[Path, ...]:
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    files = [folder / name for name in sorted(names)] or sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no *.safetensors weights: give a checkpoint folder that holds them.")
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise UserError(f"{folder} lacks {', '.join(absent)} of its index: fetch the checkpoint again.")
    return tuple(files)


def read_header(file: Path) -> dict[str, Any]:
    """{tensor name: {"dtype", "shape", "data_offsets"}} of one file, whose size must be what the header says."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if 0 < length < 100_000_000 else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not a safetensors file ({error}): fetch the checkpoint again.") from error
    header.pop("__metadata__", None)
    ends = [tensor["data_offsets"][1] for tensor in header.values()]
    if not ends or file.stat().st_size != 8 + length + max(ends):
        raise UserError(f"{file} is cut off or not a safetensors file: fetch the checkpoint again.")
    return header
