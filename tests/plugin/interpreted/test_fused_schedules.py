"""Random schedules over the kernels' backend: see random_schedule.py."""

from types import SimpleNamespace

import pytest
from random_schedule import Scheduler, run_schedule

from kvtuner_sglang.plugin import fused_backend
from kvtuner_sglang.quant import KVFormat, TensorFormat

BOOSTED = KVFormat(TensorFormat(4, axis=1, boosted=True), TensorFormat(4, symmetric=True))
# What the kernels serve in one model: keys per channel and per token, of all bits, K and V apart.
MIXED = [
    KVFormat(TensorFormat(4), TensorFormat(8, group_size=32)),
    BOOSTED,
    KVFormat(TensorFormat(2, axis=1), TensorFormat(8)),
    KVFormat(TensorFormat(8, axis=1), TensorFormat(2)),
]


@pytest.mark.parametrize("steps", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_schedules_never_show_a_wrong_token(device, steps, monkeypatch):
    monkeypatch.setattr(fused_backend, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1))
    run_schedule(Scheduler(BOOSTED, seed=3, page=64, padded=True, fragments=True, device=device,
                           backend_class=fused_backend.FusedBackend), steps)


@pytest.mark.parametrize("steps", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_layer_of_a_mixed_plan_has_its_own_format(device, steps, monkeypatch):
    monkeypatch.setattr(fused_backend, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1))
    scheduler = Scheduler(MIXED, seed=4, page=64, padded=True, fragments=True, device=device,
                          backend_class=fused_backend.FusedBackend)
    assert len(scheduler.world.backend.kinds) == 3
    run_schedule(scheduler, steps)
