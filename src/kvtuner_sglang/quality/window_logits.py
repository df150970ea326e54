"""Whole-vocabulary logits of one prefill, from the files that the plugin's measurement flag makes an engine write."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvtuner_sglang.errors import MeasurementInvalid

# The engine's log-probabilities are taken in the model's precision on its device, ours in float64.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}


def clear(folder: Path) -> None:
    """Forget what earlier passes wrote."""
    for path in folder.glob("*.npy"):
        path.unlink()


def collect(folder: Path, tokens: int) -> np.ndarray:
    """All rows in order, (tokens, vocabulary) fp32; raises MeasurementInvalid unless there are `tokens` of them."""
    parts = [np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))]
    rows = sum(part.shape[0] for part in parts)
    if rows != tokens:
        raise MeasurementInvalid(f"the engine wrote {rows} rows of logits for {tokens} tokens: see that nothing else "
                                 "uses it and measure again.")
    return np.concatenate(parts) if len(parts) > 1 else np.asarray(parts[0])


def check_order(logits: np.ndarray, tokens: Sequence[int], reported: Sequence[float], dtype: str) -> float:
    """Rows must be complete and in order: row i gives token i+1 the log-probability that the engine reports for it.

    reported: the engine's log-probability of tokens 1, 2, ...  Returns the largest difference; raises
    MeasurementInvalid above TOLERANCE.
    """
    if len(reported) != len(tokens) - 1:
        raise MeasurementInvalid(f"the engine reported {len(reported)} log-probabilities for {len(tokens)} tokens.")
    differences = [0.0]
    for low in range(0, len(reported), 128):
        rows = logits[low : min(low + 128, len(reported))].astype(np.float64)
        shifted = rows - rows.max(-1, keepdims=True)
        chosen = np.take_along_axis(shifted, np.array(tokens[low + 1 : low + 1 + len(rows)])[:, None], -1)[:, 0]
        ours = chosen - np.log(np.exp(shifted).sum(-1))
        differences.append(np.abs(ours - np.array(reported[low : low + len(rows)])).max())
    worst = float(np.max(differences))  # a NaN stays one
    if not worst <= TOLERANCE[dtype]:
        raise MeasurementInvalid(f"logits and reported log-probabilities differ by {worst:.2g}: rows are missing or "
                                 "out of order.")
    return worst
