"""Codes equal the reference's formula for every number of 16 bits, and next to where they change."""

import pytest
import torch
import triton
import triton.language as tl

from kvtuner_triton.rounding import UNIT, UNITS, divisor, integer_pairs, places, quantize
from kvtuner_triton.store import has_integers_in_pairs

BLOCK = 2**20 if triton.knobs.runtime.interpret else 1024  # a program costs the interpreter milliseconds
SCALES = (0.0, 2.0**-24, 3 * 2.0**-24, 2.0**-14, 0.0625, 0.1, 1 / 15, 1.0, 1.5, 1.9990234375, 7.3, 255.0, 65504.0)


@triton.jit
def codes_kernel(x, scale, zero, out, pairs, finer, BITS: tl.constexpr, META: tl.constexpr, SM90: tl.constexpr,
                 BLOCK: tl.constexpr):
    """out: codes one by one, pairs: those of (x, x), finer (asymmetric): four bits on a 16 times finer grid."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, scale, zero = tl.load(x + at), tl.load(scale + at), tl.load(zero + at)
    tl.store(out + at, quantize(x, scale, zero, BITS, META) & 0xFFFF)
    s, r = divisor(scale, UNITS)
    place = places(x, zero, s, r, 0.5 * UNIT, BITS, META)
    tl.store(pairs + at, integer_pairs(place, place, (1 << BITS) - 1, SM90))
    if META == 2:
        s, r = divisor(scale, UNITS / 16)
        place = places(x, zero, s, r, 8 * UNIT, 8, 2)
        tl.store(finer + at, (integer_pairs(place, place, 255, SM90) & 0xFFFF) >> 4)


def require_equal(device, x, scale, zero, bits, symmetric):
    """x, scale, zero: (n,) fp32; the formula of reference.quantize, of which this is the second half."""
    count = -(-len(x) // BLOCK) * BLOCK
    x, scale, zero = (torch.nn.functional.pad(t, (0, count - len(t)), value=1.0) for t in (x, scale, zero))
    low, middle = (torch.zeros_like(zero), 2 ** (bits - 1)) if symmetric else (zero, 0)
    code = torch.floor((x - low) / torch.where(scale != 0, scale, 1.0) + 0.5) + middle
    code = torch.where(scale != 0, code.clamp(0, 2**bits - 1), float(middle)).to(torch.int32)
    for sm90 in {has_integers_in_pairs(torch.device(device)), False}:  # other cards' instructions on every card
        out = [torch.empty(count, dtype=torch.int32, device=device) for _ in range(3)]
        codes_kernel[(count // BLOCK,)](x.to(device), scale.to(device), low.to(device), *out, BITS=bits,
                                        META=1 if symmetric else 2, SM90=sm90, BLOCK=BLOCK)
        assert torch.equal(out[0].cpu(), code)
        assert torch.equal(out[1].cpu(), code | code << 16)
        if bits == 4 and not symmetric:
            assert torch.equal(out[2].cpu(), code)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "symmetric"), [(8, False), (4, False), (2, False), (8, True), (4, True), (2, True)])
def test_every_number_of_16_bits(device, dtype, bits, symmetric):
    x = torch.arange(-2**15, 2**15).to(torch.int16).view(dtype).float()
    x = x[x.isfinite()]
    scale = torch.tensor(SCALES).half().float()[:, None, None]
    if symmetric:
        scale, zero = torch.cat([scale, -scale]), torch.zeros(())  # it has a sign
    else:
        zero = torch.cat([0 * scale, -7.5 * scale, 0 * scale - 0.37], 1).clamp(-65504, 65504).half().float()
    x, scale, zero = torch.broadcast_tensors(x, scale, zero)
    inside = (x.abs() < 2.0**100 * scale.abs()) | (scale == 0)  # a group's are at most 2^40 scales away
    require_equal(device, x[inside], scale[inside], zero[inside], bits, symmetric)


@pytest.mark.parametrize(("bits", "symmetric"), [(8, False), (4, False), (2, False), (8, True), (4, True), (2, True)])
def test_next_to_where_codes_change(device, bits, symmetric):
    """fp32 numbers a few ulp from (k - 1/2) scale + zero, of all mantissas of scale."""
    random = torch.Generator().manual_seed(bits)
    count = 2**16
    scale = (1 + torch.randint(0, 1024, (count,), generator=random) / 1024) * 2.0 ** torch.randint(
        -12, 8, (count,), generator=random)
    near = torch.randint(0, 2**bits, (count,), generator=random) - (2 ** (bits - 1) if symmetric else 0) - 0.5
    x = near * scale
    zero = torch.where(torch.rand(count, generator=random) < 0.3, -x, torch.randn(count, generator=random) * scale)
    zero = zero.clamp(-65504, 65504).half().float()
    if not symmetric:
        x = torch.where(torch.rand(count, generator=random) < 0.5, x, x + zero)
        zero = torch.where(x == near * scale, 0.0, zero)
    xs = [torch.where(x == 0, x, (x.view(torch.int32) + ulp).view(torch.float32)) for ulp in (-2, -1, 0, 1, 2)]
    xs.append(torch.randn(count, generator=random) * scale * 2.0**-23)
    zero = torch.cat([zero.repeat(5), -(near.abs() * scale).half().float()])
    require_equal(device, torch.cat(xs), scale.repeat(6), zero, bits, symmetric)
