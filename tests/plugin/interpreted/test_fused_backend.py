"""The kernels' backend stores the same bytes as the reference backend and answers the same, pass by pass."""

from types import SimpleNamespace

import pytest
import torch
from paged_batch import HEAD_DIM, KV_HEADS, LAYER, Q_HEADS, World
from sglang.srt.environ import envs

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.plugin import fused_backend
from kvtuner_sglang.plugin.extend_pass import scratch_groups
from kvtuner_sglang.quant import KVFormat, TensorFormat
from kvtuner_triton.decode import has_fragments
from kvtuner_triton.decode_case import relative_error

PAGE = 64
BOOSTED = KVFormat(TensorFormat(4, axis=1, boosted=True), TensorFormat(4, symmetric=True))
FORMATS = {
    "kv4": (BOOSTED, PAGE),
    "kv8": (KVFormat(TensorFormat(8, axis=1), TensorFormat(8)), PAGE),
    "k4v2_page128": (KVFormat(TensorFormat(4, axis=1), TensorFormat(2)), 128),
    "kv4_token": (KVFormat(TensorFormat(4), TensorFormat(4, group_size=32)), 1),
    "kv2_symmetric": (KVFormat(TensorFormat(2, symmetric=True, axis=1), TensorFormat(2, symmetric=True)), PAGE),
}
# Passes of (slot, start, end): extends that start and end anywhere, alone and together, and decode steps.
PASSES = (
    ((2, 0, 70), (4, 0, 64)),
    ((2, 70, 71), (4, 64, 65)),
    ((4, 65, 200),),
    ((2, 71, 127),),
    ((2, 127, 128), (4, 200, 201)),
    ((2, 128, 129), (4, 201, 202)),
    ((5, 0, 1), (2, 129, 260), (4, 202, 203)),
)


# In one model: keys per channel and per token, K and V apart, for which decoding is run in three ways.
MIXED = (
    KVFormat(TensorFormat(4), TensorFormat(8, group_size=32)),
    BOOSTED,
    KVFormat(TensorFormat(2, axis=1), TensorFormat(8)),
)


def packed(world: World) -> list[torch.Tensor]:
    stores = (store for layer in world.pool.layers for store in (layer.key, layer.value))
    return [t for store in stores for t in (store.codes, store.meta, store.extra) if t is not None]


# The tensor cores' kernels serve 16-bit models alone, and the interpreter truncates to bf16 instead of rounding.
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_bytes_and_answers_are_those_of_the_reference(device, name, dtype, monkeypatch):
    monkeypatch.setattr(fused_backend, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1))
    backend = compare_with_reference(*FORMATS[name], device, dtype)
    fragments = dtype == torch.bfloat16 and FORMATS[name][1] > 1 and has_fragments(device)
    assert (backend.attention == "fused") == (fragments or FORMATS[name][1] == 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layer_of_a_mixed_plan_is_that_of_the_reference(device, dtype, monkeypatch):
    monkeypatch.setattr(fused_backend, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1))
    backend = compare_with_reference(MIXED, PAGE, device, dtype)
    assert len(backend.kinds) == 3, "a step of another page or tuning cannot share a table"


def compare_with_reference(fmt, page, device, dtype):
    """All passes, layer by layer; returns the kernels' backend.

    In bf16 the truth is the reference in fp32 over the same bf16 inputs, so that it reads the same codes: the pages in
    progress are exact in both, and what the kernels may lose is twice what the reference loses in bf16.
    """
    size = {"page_size": page, "pages": 16 if page > 1 else 512, "fragments": True}
    worlds = [World(fmt, backend_class=fused_backend.FusedBackend, device=device, dtype=dtype, **size),
              World(fmt, dtype=dtype, **size), World(fmt, **size)]
    # So little that the last pass is done in two groups.
    worlds[0].backend.scratch = worlds[0].backend.scratch[:, :320]
    random = torch.Generator().manual_seed(7)
    for spans in PASSES:
        count = sum(end - start for _, start, end in spans)
        q = torch.randn(count, Q_HEADS, HEAD_DIM, generator=random)
        k, v = (torch.randn(count, KV_HEADS, HEAD_DIM, generator=random) for _ in range(2))
        outs = []
        for world in worlds:
            for slot, start, end in spans:
                world.place(slot, start, end)
            decode = all(end - start == 1 for _, start, end in spans)
            given = (x.to(dtype).to(world.device, world.dtype) for x in (q, k, v))
            outs.append([out.cpu() for out in world.forward_layers(list(spans), *given, decode=decode)])
        for number, (mine, plain, truth) in enumerate(zip(*outs, strict=True)):
            if dtype == torch.float32:
                assert torch.allclose(mine, truth, atol=2e-6, rtol=2e-5), (number, spans)
            else:
                truth = truth.double()
                assert relative_error(mine, truth) <= 2 * relative_error(plain, truth), (number, spans)
        for mine, plain, truth in zip(*map(packed, worlds), strict=True):
            assert torch.equal(mine.cpu().view(torch.uint8), plain.view(torch.uint8)), spans
            assert torch.equal(plain.view(torch.uint8), truth.view(torch.uint8)), spans
    backend = worlds[0].backend
    assert all(len(extend.groups) == 2 for extend in backend.extends.values())
    return backend


def test_long_requests_are_dequantized_in_groups():
    assert scratch_groups([3, 4, 5], 100) == [slice(0, 3)]
    assert scratch_groups([60, 50, 0, 200, 1], 100) == [slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 5)]


def test_the_scheduler_is_made_to_wait_for_the_whole_step(device, monkeypatch):
    """The kernels read req_to_token during a replay, and SGLang's faster barrier lets it be rewritten by then."""
    monkeypatch.setattr(fused_backend, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1))
    monkeypatch.setenv("SGLANG_FORCE_COARSE_WAR_BARRIER", "0")
    World(BOOSTED, page_size=PAGE, fragments=True, backend_class=fused_backend.FusedBackend, device=device)
    assert envs.SGLANG_FORCE_COARSE_WAR_BARRIER.get() is True


def test_a_layer_that_packed_pages_do_not_serve_stops(device, monkeypatch):
    monkeypatch.setattr(fused_backend, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1))
    world = World(BOOSTED, page_size=PAGE, fragments=True, backend_class=fused_backend.FusedBackend, device=device)
    strange = SimpleNamespace(**{**vars(LAYER), "logit_cap": 30.0})
    with pytest.raises(ConfigError, match="soft-capping"):
        world.backend.forward_decode(torch.zeros(1, Q_HEADS * HEAD_DIM), torch.zeros(1, KV_HEADS * HEAD_DIM),
                                     torch.zeros(1, KV_HEADS * HEAD_DIM), strange, None)
