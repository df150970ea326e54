"""The comparison against closed forms, and errors that know n."""

import math

import numpy as np
import pytest
import torch

from kvtuner_sglang.errors import MeasurementInvalid
from kvtuner_sglang.quality.compare import (
    TokenRows,
    block_mean,
    compare_logits,
    paired_difference,
    share,
)

RNG = np.random.default_rng(0)


def direct(full, quantized, tokens):
    """The definition, in numpy and float64, without slices."""
    p, q = (x.astype(np.float64) for x in (full, quantized))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    kl = (np.exp(p) * (p - q)).sum(-1)
    nll = [-q[i, tokens[i + 1]] for i in range(len(tokens) - 1)]
    return kl, p.argmax(-1) == q.argmax(-1), nll


@pytest.mark.parametrize("rows", [1, 127, 128, 300])
def test_equals_the_definition(rows):
    full = RNG.normal(size=(rows, 50)).astype(np.float32) * 3
    quantized = full + RNG.normal(size=full.shape).astype(np.float32) * 0.2
    tokens = RNG.integers(0, 50, rows).tolist()
    ours = compare_logits(full, quantized, tokens)
    kl, agree, nll = direct(full, quantized, tokens)
    np.testing.assert_allclose(ours.kl, kl, rtol=1e-9)
    np.testing.assert_array_equal(ours.agree, agree)
    np.testing.assert_allclose(ours.nll[:-1], nll, rtol=1e-12)
    assert math.isnan(ours.nll[-1])


def test_equal_logits_have_no_distance_and_a_shift_is_none():
    full = RNG.normal(size=(20, 50)).astype(np.float32)
    rows = compare_logits(full, full.astype(np.float64) + 7.0, list(range(20)))
    assert rows.kl.max() < 1e-12
    assert rows.agree.all()
    assert rows.perplexity == pytest.approx(rows.perplexity_full)


def test_tensors_and_arrays_give_the_same():
    full, other = (RNG.normal(size=(20, 50)).astype(np.float32) for _ in range(2))
    a = compare_logits(full, other, list(range(20)))
    b = compare_logits(torch.from_numpy(full), torch.from_numpy(other), list(range(20)))
    np.testing.assert_array_equal(a.kl, b.kl)


def test_perplexity_of_uniform_logits_is_the_vocabulary():
    rows = compare_logits(np.zeros((9, 50), np.float32), np.zeros((9, 50), np.float32), list(range(9)))
    assert rows.perplexity == pytest.approx(50)


def test_missing_rows_and_garbage_are_refused():
    full = np.zeros((9, 50), np.float32)
    with pytest.raises(MeasurementInvalid, match="do not belong"):
        compare_logits(full, full[:8], list(range(9)))
    with pytest.raises(MeasurementInvalid, match="do not belong"):
        compare_logits(full[:8], full[:8], list(range(9)))
    broken = full.copy()
    broken[3, 4] = np.nan
    with pytest.raises(MeasurementInvalid, match="finite"):
        compare_logits(full, broken, list(range(9)))


def test_block_errors_see_that_neighbours_are_alike():
    independent = RNG.normal(size=20_000)
    alike = np.repeat(RNG.normal(size=200), 100)
    single = independent.std(ddof=1) / math.sqrt(20_000)
    assert block_mean(independent).standard_error == pytest.approx(single, rel=0.2)
    assert block_mean(alike).standard_error == pytest.approx(alike[::100].std(ddof=1) / math.sqrt(200), rel=1e-6)
    assert math.isinf(block_mean(np.ones(150)).standard_error)


def test_intervals_cover_what_they_say():
    hits = 0
    for _ in range(400):
        full = RNG.random(512) < 0.9
        quantized = np.where(RNG.random(512) < 0.05, ~full, full)
        low, high = paired_difference(quantized.tolist(), full.tolist()).interval95
        truth = -0.05 * 0.9 + 0.05 * 0.1
        hits += low <= truth <= high
    assert 0.92 <= hits / 400 <= 0.98


def test_share_and_difference():
    assert share([True, False, True, True]).value == 0.75
    assert share([True] * 10).standard_error == 0
    difference = paired_difference([True, False, True, False], [True, True, True, True])
    assert difference.value == -0.5
    assert difference.standard_error == pytest.approx(math.sqrt(1 / 3) / 2)


def test_windows_join_in_order():
    parts = [TokenRows(*(np.full(n, float(n)) for _ in range(4))) for n in (2, 3)]
    assert TokenRows.joined(parts).kl.tolist() == [2, 2, 3, 3, 3]
