"""The torch reference against a second, slow implementation in plain Python integers and numpy float32."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvtuner_sglang.quant import KVShape, TensorFormat
from kvtuner_triton import layout, reference

BITS = st.sampled_from([8, 4, 2])
GROUPS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.sampled_from([8, 32, 64])),
    elements=st.one_of(st.just(0.0), st.floats(-6e4, 6e4, width=32), st.floats(-2, 2, width=32)),
)


def slow_quantize(row: np.ndarray, bits: int, symmetric: bool) -> tuple[list[int], list[np.float16]]:
    f32 = np.float32
    top = 2**bits - 1
    if symmetric:
        half = 2 ** (bits - 1)
        far = max(row.tolist(), key=lambda x: (abs(x), x))
        scale = np.float16(f32(far) / f32(-half))
        codes = [half if scale == 0 else int(min(max(np.floor(x / f32(scale) + f32(0.5)) + half, 0), top)) for x in row]
        return codes, [scale]
    zero, scale = np.float16(row.min()), np.float16(f32(row.max() - row.min()) / f32(top))
    codes = [0 if scale == 0 else int(min(max(np.floor((x - f32(zero)) / f32(scale) + f32(0.5)), 0), top)) for x in row]
    return codes, [scale, zero]


@settings(max_examples=60, deadline=None)
@given(GROUPS, BITS, st.booleans())
def test_codes_and_metadata_equal_the_slow_implementation(x, bits, symmetric):
    codes, meta = reference.quantize(torch.from_numpy(x), bits, symmetric=symmetric)
    for row, row_codes, row_meta in zip(x, codes.tolist(), meta.numpy(), strict=True):
        slow_codes, slow_meta = slow_quantize(row, bits, symmetric)
        assert row_codes == slow_codes
        assert row_meta.tolist() == [float(m) for m in slow_meta]


@settings(max_examples=60, deadline=None)
@given(GROUPS, BITS, st.booleans())
def test_the_error_is_at_most_a_step_and_the_rounding_of_zero_and_scale(x, bits, symmetric):
    t = torch.from_numpy(x)
    codes, meta = reference.quantize(t, bits, symmetric=symmetric)
    error = (reference.dequantize(codes, meta, bits) - t).abs()
    reach = t.abs().amax(-1, keepdim=True)
    steps = 1.0 if symmetric else 0.5  # symmetric codes reach one step less far on one side
    bound = steps * meta[:, :1].float().abs() + reach * 3 * 2.0**-11 + 2.0**-14 * (2**bits)
    assert (error <= bound).all()


@settings(max_examples=60, deadline=None)
@given(BITS, st.integers(0, 2**32 - 1))
def test_packing_is_little_end_first_and_reversible(bits, seed):
    codes = torch.randint(0, 2**bits, (3, 5, 64), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = reference.pack(codes, bits)
    assert packed.shape == (3, 5, 64 * bits // 8)
    number = int.from_bytes(bytes(packed[0, 0].tolist()), "little")
    assert [(number >> (bits * i)) & (2**bits - 1) for i in range(64)] == codes[0, 0].tolist()
    assert torch.equal(reference.unpack(packed, bits), codes)


@pytest.mark.parametrize("value", [0.0, 1.5, -7.25])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_constant_group_is_exact(value, bits):
    codes, meta = reference.quantize(torch.full((2, 64), value), bits, symmetric=False)
    assert torch.equal(reference.dequantize(codes, meta, bits), torch.full((2, 64), value))


@pytest.mark.parametrize(
    "fmt",
    [TensorFormat(b, group_size=g, symmetric=s) for b in (8, 4, 2) for g in (None, 32) for s in (True, False)]
    + [TensorFormat(4, axis=1), TensorFormat(2, axis=1, symmetric=True), TensorFormat(16)]
    + [TensorFormat(4, axis=1, boosted=True)],
)
@pytest.mark.parametrize("fragments", [False, True])
def test_pages_read_back_what_was_written_and_nothing_else(fmt, fragments):
    if fragments and (not fmt.quantized or fmt.group_size):
        pytest.skip("only whole heads of quantized pages are in fragment order")
    size = 32 if fragments else 16
    shape = KVShape(kv_heads=2, head_dim=64, itemsize=4, page_size=size)
    order = "plain" if not fragments else "keys" if fmt.per_channel else "values"
    store = layout.allocate(fmt, shape, pages=5, dtype=torch.float32, device="cpu", order=order)
    x, weight = torch.randn(2, 2, size, 64), torch.rand(2, 2, 64)
    pages = torch.tensor([3, 1])
    if fmt.per_channel or fragments:
        reference.write_pages(store, pages, x, weight)
    else:
        tokens = x.transpose(1, 2).reshape(32, 2, 64)
        order = torch.randperm(32)
        reference.write_tokens(
            store, pages.repeat_interleave(16)[order], torch.arange(16).repeat(2)[order], tokens[order]
        )
    expected = x if not fmt.quantized else reference.decode(fmt, *reference.encode(fmt, x, weight))
    back = reference.read_pages(store, pages, torch.float32)
    assert torch.equal(back, expected.transpose(0, 1).flatten(1, 2))
    untouched = store.codes[[0, 2, 4]]
    assert not untouched.any()
    assert store.extra is None or not store.extra[[0, 2, 4]].any()


def slot_of(channel: int) -> int:
    upper = channel % 64 >= 32
    return channel // 64 * 4 + [[0, 1, 2, 3], [2, 3, 0, 1]][upper][channel % 4]


def slow_boosted(page: np.ndarray, weight: np.ndarray) -> tuple[set[int], np.ndarray]:
    """Boosted channels of one page (tokens, head_dim), and the page as read back, channel by channel."""
    head_dim = page.shape[1]
    spread = page.max(0) - page.min(0)
    boosted = set()
    for slot in range(head_dim // 16):
        rivals = [c for c in range(head_dim) if slot_of(c) == slot]
        boosted.add(max(rivals, key=lambda c: (weight[c] * (spread[c] * spread[c]), -c)))
    back = np.empty_like(page)
    for c in range(head_dim):
        codes, meta = slow_quantize(page[:, c], 8 if c in boosted else 4, symmetric=False)
        back[:, c] = [np.float32(code) * np.float32(meta[0]) + np.float32(meta[1]) for code in codes]
    return boosted, back


def slow_decode(codes: torch.Tensor, meta: torch.Tensor, extra: torch.Tensor) -> np.ndarray:
    """One page from its bytes, as layout.py describes them."""

    def nibble(row: list[int], index: int) -> int:
        return (row[index // 2] >> (index % 2 * 4)) & 15

    tokens, head_dim = codes.shape[0], meta.shape[1]
    out = np.empty((tokens, head_dim), np.float32)
    for t in range(tokens):
        first, second = codes[t].tolist(), extra[t].tolist()
        for c in range(head_dim):
            scale, zero = meta[0, c].numpy(), np.float32(meta[1, c].item())
            code = nibble(first, c)
            if np.signbit(scale):
                code = code << 4 | nibble(second, slot_of(c))
            out[t, c] = np.float32(code) * np.float32(abs(scale)) + zero
    return out


def test_score_weights_sum_the_query_heads_of_each_kv_head():
    q = torch.randn(3, 6, 8)
    expected = torch.zeros(3, 2, 8)
    for head in range(6):
        expected[:, head // 3] += q[:, head] ** 2
    assert torch.allclose(reference.score_weights(q, 2), expected)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([64, 128]), st.integers(0, 2**32 - 1))
def test_the_channels_that_matter_most_have_twice_the_bits(head_dim, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 32, head_dim, generator=g) * torch.rand(3, 1, head_dim, generator=g) * 8
    x[0, :, :5] = x[0, :1, :5]  # constant channels, which no weight makes important
    weight = torch.rand(3, head_dim, generator=g).square() * 100
    fmt = TensorFormat(4, axis=1, boosted=True)
    codes, meta, extra = reference.encode(fmt, x, weight)
    back = reference.decode(fmt, codes, meta, extra)
    in_fragments = reference.encode(fmt, x, weight, "keys")
    assert torch.equal(reference.decode(fmt, *in_fragments, "keys"), back)
    for i in range(3):
        assert np.array_equal(slow_decode(codes[i], meta[i], extra[i]), back[i].numpy())
        boosted, expected = slow_boosted(x[i].numpy(), weight[i].numpy())
        assert set(torch.signbit(meta[i, 0]).nonzero()[:, 0].tolist()) == boosted
        assert np.array_equal(back[i].numpy(), expected)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128, 176, 256])
def test_every_slot_has_sixteen_channels(head_dim):
    assert layout.boost_slots(head_dim).bincount().tolist() == [16] * (head_dim // 16)


def test_boosted_channels_that_are_constant_come_back_exactly():
    fmt = TensorFormat(4, axis=1, boosted=True)
    x = torch.full((1, 16, 64), 2.5)
    assert torch.equal(reference.decode(fmt, *reference.encode(fmt, x, torch.ones(1, 64))), x)


def test_allocated_bytes_are_the_formula():
    shape = KVShape(kv_heads=2, head_dim=64, itemsize=4, page_size=16)
    for fmt in (
        TensorFormat(16),
        TensorFormat(8),
        TensorFormat(4, group_size=32),
        TensorFormat(2, axis=1),
        TensorFormat(4, symmetric=True),
        TensorFormat(4, axis=1, boosted=True),
    ):
        store = layout.allocate(fmt, shape, pages=7, dtype=torch.float32, device="cpu")
        assert store.nbytes == 7 * 16 * shape.tensor_bytes_per_token(fmt)
