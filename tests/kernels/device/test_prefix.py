"""Unpacking equals the reference exactly; prefill attention errs at most twice as much as plain PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_places import HEAD_DIM, KV_HEADS, PAGE, moved
from kvtuner_sglang.quant import TensorFormat
from kvtuner_triton.decode_case import relative_error
from kvtuner_triton.prefix import PrefixTuning, prefix_tables, prefix_tuning
from kvtuner_triton.prefix_case import attend, random_prefix_case
from kvtuner_triton.unpack import unpack_blocks

BITS = st.sampled_from([8, 4, 2])
DTYPE = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
SHAPE = st.sampled_from([(7, 1, 128), (8, 2, 64), (3, 1, 64), (4, 4, 128)])  # q heads, kv heads, head_dim
SPREADS = st.sampled_from([(1.0, 1.0), (0.0, 1e-3), (30.0, 300.0), (1e-3, 1.0)])  # keys, values
BOOSTED = TensorFormat(4, axis=1, boosted=True)


def spans(page):
    """First new position and end of some requests."""
    length = st.one_of(st.sampled_from([1, page, 2 * page]), st.integers(1, 2 * page))
    start = st.one_of(st.sampled_from([0, page, 2 * page - 1]), st.integers(0, 2 * page))
    return st.lists(st.tuples(start, length).map(lambda x: (x[0], sum(x))), min_size=1, max_size=3)


@st.composite
def tunings(draw, dtype):
    rows = draw(st.sampled_from([32, 64] if dtype == torch.float32 else [64, 128]))
    heads = draw(st.sampled_from([1, 2, 4]))
    if dtype == torch.float32:
        return PrefixTuning(rows // heads, heads, 32, stages=1)
    return PrefixTuning(rows // heads, heads, draw(st.sampled_from([32, 64])))


def per_channel(data):
    key = data.draw(st.one_of(st.just(BOOSTED), st.builds(TensorFormat, BITS, st.none(), st.booleans(), st.just(1))))
    return key, TensorFormat(data.draw(BITS), None, data.draw(st.booleans()))


def check_unpacked(case):
    scratch = case.unpack()
    row = 0
    for b, count in enumerate(case.counts):
        for got, x in zip(scratch, case.stored(b), strict=True):
            expected = x.float().to(case.q.dtype).transpose(0, 1)  # float64 holds it exactly, so fp32 rounds once
            assert torch.equal(got[row:row + count], expected)
        row += count
    for got in scratch:
        assert got[row:].isnan().all()


def check(case, tuning):
    """With few queries errors depend on luck, which may cancel them in plain PyTorch alone.

    So take the worst of four orders of the sum that fp32 scores depend on, and what rounding unpacked keys and values
    to the kernel's dtype costs even where all that follows is exact.
    """
    truth, dtype = attend(case, torch.float64), case.q.dtype
    orders = [slice(None)] + [torch.randperm(case.q.shape[2], generator=torch.Generator().manual_seed(i))
                              for i in range(3 if dtype == torch.float32 else 0)]
    plain = max(relative_error(attend(case, dtype, order), truth) for order in orders)
    rounding = relative_error(attend(case, torch.float64, unpacked=dtype), truth)
    assert relative_error(case.run(tuning), truth) <= 2 * max(plain, rounding)


@pytest.mark.parametrize("seed", [1, 23, 24])  # errors of plain PyTorch cancel: the kernel's are 2 to 4 times as large
def test_one_query_over_large_keys_errs_as_its_rounded_keys_do(device, seed):
    case = random_prefix_case([(64, 65)], q_heads=8, kv_heads=2, head_dim=64, page=1,
                              formats=(TensorFormat(4, 32, symmetric=True), TensorFormat(8)), key_spread=30.0,
                              value_spread=300.0, seed=seed, device=device)
    check(case, prefix_tuning(4, None, torch.bfloat16))


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_pages(device, data):
    heads, kv_heads, head_dim = data.draw(SHAPE)
    page, dtype = data.draw(st.sampled_from([64, 128])), data.draw(DTYPE)
    key_spread, value_spread = data.draw(SPREADS)
    case = random_prefix_case(data.draw(spans(page)), q_heads=heads, kv_heads=kv_heads, head_dim=head_dim, page=page,
                              formats=per_channel(data), dtype=dtype, key_spread=key_spread,
                              value_spread=value_spread, seed=data.draw(st.integers(0, 99)), device=device)
    check_unpacked(case)
    check(case, data.draw(st.one_of(st.just(prefix_tuning(heads // kv_heads, page, dtype)), tunings(dtype))))


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_tokens(device, data):
    heads, kv_heads, head_dim = data.draw(SHAPE)
    dtype = data.draw(DTYPE)
    formats = tuple(TensorFormat(data.draw(BITS), data.draw(st.sampled_from([None, 32, 64])), data.draw(st.booleans()))
                    for _ in range(2))
    key_spread, value_spread = data.draw(SPREADS)
    case = random_prefix_case(data.draw(spans(64)), q_heads=heads, kv_heads=kv_heads, head_dim=head_dim,
                              page=data.draw(st.sampled_from([1, 16])), formats=formats, dtype=dtype,
                              key_spread=key_spread, value_spread=value_spread, seed=data.draw(st.integers(0, 99)),
                              device=device)
    check_unpacked(case)
    check(case, data.draw(st.one_of(st.just(prefix_tuning(heads // kv_heads, None, dtype)), tunings(dtype))))


@pytest.mark.parametrize("page", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_boosted_keys(device, page, head_dim):
    case = random_prefix_case([(page + 3, 3 * page + 5)], q_heads=2, kv_heads=2, head_dim=head_dim, page=page,
                              formats=(BOOSTED, TensorFormat(4, symmetric=True)), device=device)
    assert (case.keys.meta[:, :, 0] < 0).sum(-1).unique().tolist() in ([head_dim // 16], [0, head_dim // 16])
    check_unpacked(case)
    check(case, prefix_tuning(1, page, torch.bfloat16))


@pytest.mark.parametrize("formats", [(TensorFormat(8, axis=1), TensorFormat(8)), (TensorFormat(8), TensorFormat(8))],
                         ids=["pages", "tokens"])
def test_pages_and_slots_anywhere(device, formats, place):
    case = random_prefix_case([(PAGE + 3, 3 * PAGE + 5)], q_heads=4, kv_heads=KV_HEADS, head_dim=HEAD_DIM, page=PAGE,
                              formats=formats, device=device)
    far = moved(case, place)
    check_unpacked(far)
    check(far, prefix_tuning(2, far.page, torch.bfloat16))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 700), min_size=1, max_size=5), st.sampled_from([64, 128]))
def test_blocks_cover_every_token_once(tokens, size):
    blocks = unpack_blocks([10 + b for b in range(len(tokens))], tokens, size).tolist()
    expected, row = [], 0
    for b, count in enumerate(tokens):
        expected += [[10 + b, i, min(size, count - i), row + i] for i in range(0, count, size)]
        row += count
    assert blocks == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=5),
       st.sampled_from([32, 64, 128]))
def test_tiles_cover_every_new_token_once(pairs, tokens):
    starts, ends = [a for a, _ in pairs], [a + n for a, n in pairs]
    requests, tiles = prefix_tables(list(range(len(pairs))), starts, ends, ends, tokens)
    covered = sorted((b, t) for b, first in tiles.tolist()
                     for t in range(max(first, starts[b]), min(first + tokens, ends[b])))
    assert covered == [(b, t) for b in range(len(pairs)) for t in range(starts[b], ends[b])]
    assert len({tuple(x) for x in tiles.tolist()}) == len(tiles)
    work = [min(first + tokens, ends[b]) for b, first in tiles.tolist()]
    assert work == sorted(work, reverse=True)
    assert requests[:, 3].tolist() == [sum(n for _, n in pairs[:b]) for b in range(len(pairs))]
    assert requests[:, 4].tolist() == [sum(ends[:b]) for b in range(len(pairs))]
