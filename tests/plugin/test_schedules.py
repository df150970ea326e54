"""Random schedules over the real pool and backend against a plain dictionary of tokens.

Extends that start and end anywhere in a page, mixed chunks, decode batches, aborts, retractions, prefix hits on pages
of other requests, slots reused at once: no query ever sees a stale, lost or foreign token.
"""

import pytest
from random_schedule import Scheduler, run_schedule

from kvtuner_sglang.quant import KVFormat, TensorFormat

FORMATS = [
    KVFormat(TensorFormat(4, axis=1, boosted=True), TensorFormat(4, symmetric=True)),
    KVFormat(TensorFormat(2, axis=1), TensorFormat(8)),
]


@pytest.mark.parametrize(
    ("fmt", "steps"),
    [
        (FORMATS[0], 300),
        (FORMATS[1], 300),
        pytest.param(FORMATS[0], 5000, marks=pytest.mark.slow),
        pytest.param(FORMATS[1], 5000, marks=pytest.mark.slow),
    ],
)
def test_random_schedules_never_show_a_wrong_token(fmt, steps):
    run_schedule(Scheduler(fmt, seed=FORMATS.index(fmt)), steps)
