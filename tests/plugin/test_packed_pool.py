"""The real pool and backend: what is stored, what a query sees, and that SGLang's own accessors stay shut."""

import pytest
import torch
from paged_batch import HEAD_DIM, KV_HEADS, Q_HEADS, World, attention_by_hand

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.quant import KVFormat, TensorFormat
from kvtuner_triton import reference


def tokens(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, Q_HEADS, HEAD_DIM, generator=g),
        torch.randn(n, KV_HEADS, HEAD_DIM, generator=g) * 3,
        torch.randn(n, KV_HEADS, HEAD_DIM, generator=g),
    )


def slow_packed(x: torch.Tensor, bits: int, group: int, symmetric: bool) -> tuple[list[int], list[float]]:
    """Bytes and metadata of one token's head, number by number in float32, without the code under test."""
    code_bits, meta = "", []
    f32 = torch.tensor
    for start in range(0, HEAD_DIM, group):
        part = x[start : start + group]
        if symmetric:
            half = 2 ** (bits - 1)
            far = max(part.tolist(), key=lambda x: (abs(x), x))
            scale = (f32(far) / f32(-float(half))).half()
            meta += [scale.item()]
            codes = [torch.floor(e / scale.float() + 0.5).item() + half for e in part]
        else:
            zero = part.min().half()
            scale = ((part.max() - part.min()) / f32(float(2**bits - 1))).half()
            meta += [scale.item(), zero.item()]
            codes = [torch.floor((e - zero.float()) / scale.float() + 0.5).item() for e in part]
        for code in codes:
            code_bits = format(int(min(max(code, 0), 2**bits - 1)), f"0{bits}b") + code_bits
    return list(int(code_bits, 2).to_bytes(len(code_bits) // 8, "little")), meta


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64])
def test_the_pool_holds_exactly_the_packed_codes_scales_and_zeros(bits, symmetric, group):
    fmt = TensorFormat(bits, group_size=group, symmetric=symmetric)
    world = World(KVFormat(fmt, fmt), page_size=1)
    q, k, v = tokens(5)
    locations = world.place(2, 0, 5)
    world.forward([(2, 0, 5)], q, k, v)
    layer = world.pool.layer(0)
    for store, x in ((layer.key, k), (layer.value, v)):
        for t, location in enumerate(locations.tolist()):
            for head in range(KV_HEADS):
                code_bytes, meta = slow_packed(x[t, head], bits, group, symmetric)
                assert store.codes[location, head, 0].tolist() == code_bytes
                assert store.meta[location, head, 0].flatten().tolist() == meta


@pytest.mark.parametrize("bits_key", [16, 8, 4, 2])
@pytest.mark.parametrize("bits_value", [16, 4])
def test_a_query_reads_every_token_as_stored_its_own_too(bits_key, bits_value):
    if bits_key == bits_value == 16:
        pytest.skip("nothing is quantized")
    fmt = KVFormat(TensorFormat(bits_key), TensorFormat(bits_value))
    world = World(fmt, page_size=1, pages=256)
    q, k, v = tokens(150)
    spans = [(1, 0, 70), (1, 70, 71), (1, 71, 150)]
    outs = []
    for slot, start, end in spans:
        world.place(slot, start, end)
        outs.append(
            world.forward([(slot, start, end)], q[start:end], k[start:end], v[start:end], decode=end - start == 1)
        )
    out = torch.cat(outs)
    key = reference.decode(fmt.key, *reference.encode(fmt.key, k)) if bits_key != 16 else k
    value = reference.decode(fmt.value, *reference.encode(fmt.value, v)) if bits_value != 16 else v
    for t in (0, 1, 63, 64, 70, 71, 149):
        expected = attention_by_hand(q[t], key[: t + 1], value[: t + 1])
        assert torch.allclose(out[t].double(), expected, atol=2e-5)


def test_requests_of_one_batch_do_not_see_each_other():
    fmt = KVFormat(TensorFormat(4), TensorFormat(4))
    together, alone = World(fmt, page_size=1), World(fmt, page_size=1)
    q, k, v = tokens(30)
    for slot, start, end in ((1, 0, 12), (3, 0, 18)):
        together.place(slot, start, end)
    both = together.forward([(1, 0, 12), (3, 0, 18)], q, k, v)
    alone.place(3, 0, 18)
    assert torch.equal(both[12:], alone.forward([(3, 0, 18)], q[12:], k[12:], v[12:]))


def test_nothing_reads_or_writes_around_the_format():
    pool = World(KVFormat(TensorFormat(4), TensorFormat(4)), page_size=1).pool
    for name in (
        "set_kv_buffer",
        "get_key_buffer",
        "get_value_buffer",
        "get_kv_buffer",
        "get_raw_kv_buffer",
        "set_kv_buffer_prefix_valid",
        "move_kv_cache",
        "get_cpu_copy",
        "load_cpu_copy",
        "get_contiguous_buf_infos",
    ):
        with pytest.raises(ConfigError, match="full-precision KV buffers"):
            getattr(pool, name)(0)


@pytest.mark.parametrize(("bits_key", "bits_value"), [(8, 8), (4, 4), (2, 2), (8, 4), (16, 4)])
def test_allocated_bytes_follow_the_formula(bits_key, bits_value):
    fmt = KVFormat(TensorFormat(bits_key), TensorFormat(bits_value))
    pool = World(fmt, page_size=1, pages=64).pool
    assert pool.pool_bytes == 64 * pool.shape.bytes_per_token([fmt])
