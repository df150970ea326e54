"""Every figure of a published quality record is what its samples give, to the digits that samples have."""

from pathlib import Path

import numpy as np
import pytest

from kvtuner_sglang.evidence.record import load_record
from kvtuner_sglang.evidence.samples import read_samples
from kvtuner_sglang.quality.compare import TokenRows
from kvtuner_sglang.quality.figures import item_metrics, prose_metrics

RUNS = sorted((Path(__file__).parents[2] / "runs" / "published" / "quality").glob("quality-*"))
DIGITS = 1e-5  # of six that a sample keeps


@pytest.mark.parametrize("run_dir", RUNS, ids=lambda path: path.name)
def test_metrics_are_those_of_the_samples(run_dir):
    samples = read_samples(run_dir)
    rows = [TokenRows(*(np.array(s[name], dtype=float) for name in ("kl", "agree", "nll_full", "nll")))
            for s in samples if s["kind"] == "prose"]
    metrics = prose_metrics(rows)
    for kind in sorted({s["kind"] for s in samples} - {"prose"}):
        items = [s for s in samples if s["kind"] == kind]
        metrics |= item_metrics(kind, [s["right"] for s in items], [s["right_full"] for s in items])
    published = load_record(run_dir).metrics
    assert metrics.keys() == published.keys()
    for name, metric in metrics.items():
        assert metric.n == published[name].n
        assert metric.mean == pytest.approx(published[name].mean, rel=DIGITS, abs=1e-12), name
