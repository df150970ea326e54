"""Plain layers are for float32 on a GPU, and nothing else."""

from types import SimpleNamespace

import pytest

from kvtuner_sglang.plugin import plain_layers


@pytest.mark.parametrize(("dtype", "device", "has_gpu", "needed"), [
    ("float32", "cuda", True, True), ("float", "cuda", True, True), ("bfloat16", "cuda", True, False),
    ("auto", "cuda", True, False), ("float32", "cpu", True, False), ("float32", "cuda", False, False),
])
def test_needed(monkeypatch, dtype, device, has_gpu, needed):
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    assert plain_layers.needed(SimpleNamespace(dtype=dtype, device=device)) is needed
