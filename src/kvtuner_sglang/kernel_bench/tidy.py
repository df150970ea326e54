"""Samples -> the tidy table: one row a kernel, format and cell."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.record import RunRecord
from kvtuner_sglang.evidence.samples import read_samples
from kvtuner_sglang.kernel_bench.samples import Sample, best, ceilings_of, sample_of
from kvtuner_sglang.kernel_bench.table import floor_us

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("gpu", "kernel", "format", "key_axis", "q_heads", "kv_heads", "head_dim", "page", "batch", "context",
           "median_us", "p20_us", "p80_us", "bytes", "floor_us", "commit")


def tidy(samples: Sequence[Sample], gpu: str, commit: str) -> "pd.DataFrame":
    """Decode times a layer, of each kernel the fastest of its options; bytes / floor_us is the plain read bandwidth."""
    import pandas as pd

    read = ceilings_of(samples).read_gb_s
    rows = []
    for t in best(samples):
        low, median, high = np.percentile(t.us, [20, 50, 80])
        rows.append((gpu, t.kernel, t.format, t.key_axis, t.q_heads, t.kv_heads, t.head_dim, t.page, t.batch, t.context,
                     median, low, high, t.bytes, floor_us(t, read), commit))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def gpu_of(record: RunRecord) -> str:
    """The one GPU that was measured; raises UserError if the record does not say."""
    if not record.environment.gpus:
        raise UserError(f"{record.name} names no GPU ({record.environment.unknown.get('gpus')}): repeat it where "
                        "nvidia-smi works.")
    return record.environment.gpus[0]


def table_of_run(run_dir: Path, record: RunRecord) -> "pd.DataFrame":
    samples = [sample_of(line) for line in read_samples(run_dir)]
    return tidy(samples, gpu_of(record), (record.environment.git_sha or "unknown")[:12])
