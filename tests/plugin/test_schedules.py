"""Random schedules over the real pool and backend against a plain dictionary of tokens.

Extends that start and end anywhere in a page, mixed chunks, decode batches, aborts, retractions, prefix hits on pages
of other requests, slots reused at once: no query ever sees a stale, lost or foreign token.
"""

import pytest
from random_schedule import Scheduler, run_schedule

from kvtuner_sglang.quant import KVFormat, TensorFormat

BOOSTED = KVFormat(TensorFormat(4, axis=1, boosted=True), TensorFormat(4, symmetric=True))
FORMATS = [
    BOOSTED,
    KVFormat(TensorFormat(2, axis=1), TensorFormat(8)),
]
# Layers that share pages and nothing else: keys per channel and per token, 8 to 2 bits, 16 for one or for both.
MIXED = [
    KVFormat(TensorFormat(8), TensorFormat(4)),
    BOOSTED,
    KVFormat(TensorFormat(16), TensorFormat(16)),
    KVFormat(TensorFormat(2, axis=1), TensorFormat(16)),
    KVFormat(TensorFormat(16), TensorFormat(2, group_size=32)),
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


@pytest.mark.parametrize("steps", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_layer_of_a_mixed_plan_has_its_own_format(steps):
    run_schedule(Scheduler(MIXED, seed=5), steps)
