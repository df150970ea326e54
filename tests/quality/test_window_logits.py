"""Rows that are missing, doubled or swapped are found."""

import numpy as np
import pytest

from kvtuner_sglang.errors import MeasurementInvalid
from kvtuner_sglang.quality.window_logits import check_order, clear, collect

TOKENS = list(range(40))


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32) * 3


def reported(logits):
    x = logits.astype(np.float64)
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    return [float(x[i, i + 1]) for i in range(39)]


def test_files_of_chunks_are_joined_in_order(tmp_path, logits):
    for number, (low, high) in enumerate([(0, 16), (16, 32), (32, 40)]):
        np.save(tmp_path / f"{number:08d}.npy", logits[low:high])
    joined = collect(tmp_path, 40)
    np.testing.assert_array_equal(joined, logits)
    assert check_order(joined, TOKENS, reported(logits), "float32") < 1e-6
    clear(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rows", [39, 41])
def test_a_pass_too_many_or_too_few_is_refused(tmp_path, rows):
    np.save(tmp_path / "00000000.npy", np.zeros((rows, 50), np.float32))
    with pytest.raises(MeasurementInvalid, match=f"{rows} rows of logits for 40 tokens"):
        collect(tmp_path, 40)


def test_swapped_and_shifted_rows_are_refused(logits):
    swapped = logits[[1, 0, *range(2, 40)]]
    shifted = np.roll(logits, 1, axis=0)
    for wrong in (swapped, shifted):
        with pytest.raises(MeasurementInvalid, match="out of order"):
            check_order(wrong, TOKENS, reported(logits), "float32")
    with pytest.raises(MeasurementInvalid, match="38 log-probabilities"):
        check_order(logits, TOKENS, reported(logits)[:-1], "float32")
    broken = logits.copy()
    broken[5] = np.nan
    with pytest.raises(MeasurementInvalid, match="out of order"):
        check_order(broken, TOKENS, reported(logits), "float32")
