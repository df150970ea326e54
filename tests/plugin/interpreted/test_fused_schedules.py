"""Random schedules over the kernels' backend: see random_schedule.py."""

from types import SimpleNamespace

import pytest
from random_schedule import Scheduler, run_schedule

from kvtuner_sglang.plugin import fused_backend
from kvtuner_sglang.quant import KVFormat, TensorFormat

BOOSTED = KVFormat(TensorFormat(4, axis=1, boosted=True), TensorFormat(4, symmetric=True))
# One layer of each rule of visibility; bits are mixed in test_fused_backend.py.
MIXED = [KVFormat(TensorFormat(2), TensorFormat(8, group_size=32)), BOOSTED]


@pytest.mark.parametrize("steps", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_schedules_never_show_a_wrong_token(device, steps, monkeypatch):
    monkeypatch.setattr(fused_backend, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1))
    run_schedule(Scheduler(BOOSTED, seed=3, page=64, padded=True, fragments=True, device=device,
                           backend_class=fused_backend.FusedBackend), steps)


@pytest.mark.parametrize("steps", [10, pytest.param(500, marks=pytest.mark.slow)])
def test_every_layer_of_a_mixed_plan_has_its_own_format(device, steps, monkeypatch):
    monkeypatch.setattr(fused_backend, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1))
    run_schedule(Scheduler(MIXED, seed=56, page=64, unit=2, padded=True, fragments=True, device=device,
                           backend_class=fused_backend.FusedBackend), steps)
