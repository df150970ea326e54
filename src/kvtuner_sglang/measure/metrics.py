"""From many values to one summary with its unit and its n."""

from collections.abc import Sequence

import numpy as np

from kvtuner_sglang.evidence.record import Metric


def summarize(values: Sequence[float], unit: str) -> Metric:
    """Mean, extremes and linearly interpolated percentiles; raises ValueError unless there are values, all finite."""
    data = np.asarray(values, dtype=np.float64)
    if not values or not np.isfinite(data).all():
        raise ValueError(f"no summary of these values: {list(values)}")
    p50, p90, p99 = np.percentile(data, [50, 90, 99])
    return Metric(unit=unit, n=len(values), mean=float(data.mean()), p50=float(p50), p90=float(p90), p99=float(p99),
                  min=float(data.min()), max=float(data.max()))


def single(value: float, unit: str, n: int) -> Metric:
    """One figure that was computed from `n` values."""
    return Metric(unit=unit, n=n, mean=value, p50=value, p90=value, p99=value, min=value, max=value)
