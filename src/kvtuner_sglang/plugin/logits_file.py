"""Measurement only: whole-vocabulary logits of every forward pass, which HTTP cannot return."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

_folder: Path | None = None
_numbers = itertools.count()


def write_to(folder: Path) -> None:
    """From now on this process writes (rows, vocabulary) fp32 arrays named 00000000.npy, 00000001.npy, ..."""
    global _folder
    folder.mkdir(parents=True, exist_ok=True)
    _folder = folder


def around_get_logits(original: Callable[..., torch.Tensor], self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Wraps LogitsProcessor._get_logits, which the last pipeline stage calls for every row it needs."""
    logits = original(self, *args, **kwargs)
    if _folder is not None:
        np.save(_folder / f"{next(_numbers):08d}.npy", logits.float().cpu().numpy())
    return logits
