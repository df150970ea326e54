"""Decode attention over packed pages: error at most twice that of plain PyTorch in bf16."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_places import HEAD_DIM, KV_HEADS, PAGE, moved
from kvtuner_sglang.quant import TensorFormat
from kvtuner_triton.decode import DecodeBuffers, DecodeWorkspace, Tuning, decode_attention, default_tuning
from kvtuner_triton.decode_case import TokenCase, attend, random_case, random_token_case, relative_error
from kvtuner_triton.decode_token import BLOCK, decode_token_attention, token_tuning

BITS = st.sampled_from([8, 4, 2])
KEYS = st.sampled_from([(4, False, True), (8, False, False), (4, False, False), (2, False, False), (4, True, False),
                        (8, True, False)])  # bits, symmetric, boosted
DTYPE = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
SHAPE = st.sampled_from([(7, 1, 128), (8, 2, 64), (3, 1, 64), (4, 4, 128)])  # q heads, kv heads, head_dim
SPREADS = st.sampled_from([(2.0, 1.0), (0.0, 1e-3), (30.0, 300.0), (1e-3, 1.0)])  # keys, values
KERNELS = [pytest.param(True, id="portable"), pytest.param(False, id="fragments", marks=pytest.mark.gpu)]


def lengths(page):
    near = st.sampled_from([1, page, page + 1, 2 * page, 3 * page + 17])
    return st.lists(st.one_of(near, st.integers(1, 4 * page)), min_size=1, max_size=4)


def run(case, portable, tuning=None, rows_sm=1, buffers=None):
    """Two steps over poisoned buffers, which must agree -> out (batch, q_heads, head_dim)."""
    outs = []
    for _ in range(2):
        tokens = isinstance(case, TokenCase)
        work = DecodeWorkspace(*case.q.shape[:2], case.kv_heads, case.q.shape[2], BLOCK if tokens else case.page,
                               case.q.device, tuning or Tuning(), multiprocessors=rows_sm, portable=portable,
                               buffers=buffers)
        # The interpreter truncates to bf16, so there torch rounds instead.
        out = torch.full_like(case.q, float("nan"), dtype=torch.float32 if case.q.is_cpu else None)
        work.partial.fill_(float("nan"))
        work.lse.fill_(float("nan"))
        work.plan(case.seq_lens, case.slots)
        if tokens:
            decode_token_attention(work, case.q, case.keys, case.values, case.req_to_token, case.sm_scale, out)
        else:
            decode_attention(work, case.q, case.keys, case.values, case.tail_key, case.tail_value, case.req_to_token,
                             case.sm_scale, out)
        outs.append(out.to(case.q.dtype))
    assert torch.equal(*outs)
    return outs[0]


def check(case, out, bound=torch.bfloat16):
    """At most twice the error of PyTorch in `bound`, in fp32 in fp32.

    bf16 is what the kernels promise of 16-bit models whatever the keys and values: where few tokens decide, a single
    rounding of fp16 falls here or there by chance.  In fp32 what rounding a score once or twice costs comes on top: an
    exponent's absolute error is its size times 2^-24, and p's relative error is that.
    """
    truth, error = attend(case, torch.float64), relative_error
    if case.q.dtype == torch.float32:
        assert error(out, truth) <= 2 * error(attend(case, torch.float32), truth) + 2**-23 * (1 + largest_score(case))
    else:
        assert error(out, truth) <= 2 * error(attend(case, bound), truth)


def largest_score(case) -> float:
    """max |q . k| sm_scale over all requests and heads."""
    group = case.q.shape[1] // case.kv_heads
    return max((case.q[b].double().unflatten(0, (-1, group)) @ case.history(b)[0].transpose(1, 2)).abs().max().item()
               for b in range(len(case.q))) * case.sm_scale


@pytest.mark.parametrize("portable", KERNELS)
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_packed_pages(device, portable, data):
    heads, kv_heads, head_dim = data.draw(SHAPE)
    page, value_bits = data.draw(st.sampled_from([64, 128])), data.draw(BITS)
    key_bits, symmetric_keys, boosted = data.draw(KEYS)
    key_spread, value_spread = data.draw(SPREADS)
    case = random_case(data.draw(lengths(page)), q_heads=heads, kv_heads=kv_heads, head_dim=head_dim, page=page,
                       key_bits=key_bits, value_bits=value_bits,
                       symmetric=(symmetric_keys, symmetric_keys or data.draw(st.booleans())), boosted=boosted,
                       dtype=data.draw(DTYPE), key_spread=key_spread, value_spread=value_spread,
                       seed=data.draw(st.integers(0, 99)), device=device)
    check(case, run(case, portable, default_tuning(key_bits, value_bits)))


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_tokens(device, data):
    heads, kv_heads, head_dim = data.draw(SHAPE)
    formats = tuple(TensorFormat(data.draw(BITS), data.draw(st.sampled_from([None, 32, 64])), data.draw(st.booleans()))
                    for _ in range(2))
    key_spread, value_spread = data.draw(SPREADS)
    case = random_token_case(data.draw(lengths(BLOCK)), q_heads=heads, kv_heads=kv_heads, head_dim=head_dim,
                             page=data.draw(st.sampled_from([1, 3, 16, 64])), formats=formats, dtype=data.draw(DTYPE),
                             key_spread=key_spread, value_spread=value_spread, seed=data.draw(st.integers(0, 99)),
                             device=device)
    check(case, run(case, True, token_tuning()))


@pytest.mark.parametrize("portable", KERNELS)
@pytest.mark.parametrize(("head_dim", "page"), [(128, 64), (64, 128)])
def test_boosted_keys(device, portable, head_dim, page):
    """The default format, in every run of the tests."""
    case = random_case([1, page, page + 1, 3 * page + 5], q_heads=6, kv_heads=2, head_dim=head_dim, page=page,
                       key_bits=4, value_bits=4, symmetric=(False, True), boosted=True, device=device)
    check(case, run(case, portable, default_tuning(4, 4)))


@pytest.mark.parametrize("portable", KERNELS)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_an_fp16_model_keeps_its_own_precision(device, portable, bits):
    """Over pages of ordinary requests, where roundings average; bf16's error is eight times as large."""
    case = random_case([130, 65, 200], q_heads=6, kv_heads=2, head_dim=64, page=64, key_bits=bits, value_bits=bits,
                       symmetric=(False, True), boosted=bits == 4, dtype=torch.float16, device=device)
    check(case, run(case, portable, default_tuning(bits, bits)), torch.float16)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_an_fp16_model_keeps_its_own_precision_per_token(device, bits):
    case = random_token_case([130, 65, 200], q_heads=6, kv_heads=2, head_dim=64, page=16,
                             formats=(TensorFormat(bits), TensorFormat(bits, symmetric=True)), dtype=torch.float16,
                             device=device)
    check(case, run(case, True, token_tuning()), torch.float16)


@pytest.mark.parametrize("portable", KERNELS)
def test_more_requests_than_the_gpu_holds_at_once(device, portable):
    case = random_case([65, 1, 200, 64, 129, 300], q_heads=2, kv_heads=1, head_dim=64, page=64, key_bits=4,
                       value_bits=4, device=device)
    check(case, run(case, portable, Tuning(programs_per_sm=2)))


def test_an_fp32_query_is_answered_in_fp32_where_fragments_would_be_used(device):
    case = random_case([70, 200], q_heads=2, kv_heads=1, head_dim=64, page=64, key_bits=4, value_bits=4,
                       symmetric=(False, True), boosted=True, dtype=torch.float32, device=device)
    check(case, run(case, False))


@pytest.mark.parametrize("portable", KERNELS)
def test_batches_of_several_sizes_share_buffers(device, portable):
    large = DecodeWorkspace(5, 2, 1, 64, 64, device, multiprocessors=1, portable=portable)
    for lengths in ([65, 1, 200, 64, 129], [300], [20, 130]):
        case = random_case(lengths, q_heads=2, kv_heads=1, head_dim=64, page=64, key_bits=4, value_bits=4,
                           device=device)
        check(case, run(case, portable, buffers=large.buffers))
    with pytest.raises(ValueError, match="do not hold"):
        DecodeWorkspace(5, 2, 1, 64, 64, device, multiprocessors=1, portable=portable,
                        buffers=DecodeBuffers(3, 5, 2, 64, device))


@pytest.mark.parametrize("portable", KERNELS)
def test_pages_and_slots_anywhere(device, portable, place):
    case = random_case([1, 65, 3 * PAGE + 5], q_heads=4, kv_heads=KV_HEADS, head_dim=HEAD_DIM, page=PAGE, key_bits=8,
                       value_bits=8, symmetric=(False, True), device=device)
    far = moved(case, place)
    check(far, run(far, portable, default_tuning(8, 8)))


def test_tokens_anywhere(device, place):
    case = random_token_case([1, 65, 3 * PAGE + 5], q_heads=4, kv_heads=KV_HEADS, head_dim=HEAD_DIM, page=PAGE,
                             formats=(TensorFormat(8), TensorFormat(8)), device=device)
    far = moved(case, place)
    check(far, run(far, True, token_tuning()))
