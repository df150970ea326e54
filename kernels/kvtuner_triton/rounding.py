"""Scales, zeros and codes of numbers, inside kernels: the formulas of reference.py, bit for bit.

Nothing here is a sum of products, so there is nothing to contract, and every quotient d / s is rounded as IEEE says, in
three instructions instead of eleven: q = d r with r about 1 / s, then q + r (d - q s) in two FMAs.  s has at most 11
bits (an fp16, or 2^b - 1), so d - q s is exact, and a quotient of 24 by 11 bits stays 2^-12 ulp away from where
rounding turns, while r, good to 2^-22, leaves 2^-20 ulp.  (Where q is so small that this fails, adding 1/2 or
rounding to fp16 forgets it.  torch on CUDA multiplies by the reciprocal of a number instead of dividing, and may differ
from torch on a CPU by a bit.)

A place is (x - zero) / scale + 1/2, of which the code is the integer part, times 2^-24: scaling by powers of two rounds
nothing, and an addition that saturates leaves 0 .. 1.  Below 2^-14 fp16 has the multiples of 2^-24, and their bits are
the integers: two places rounded to fp16 towards zero, one instruction, are two codes, and what is larger has larger
bits.  So has 1/2 + place in fp32, rounded towards zero.

    asymmetric   place = sat(q + half)               half: 1/2, all in units of 2^-24
    symmetric    place = sat(floor'(y + middle))     y = q + half as rounded to nearest, of any sign; floor' rounds
                                                     down, so that what is just below an integer stays there
    2^n finer    floor(2^n t + 2^(n-1)) >> n = floor(t + 1/2) for the quotient t: the same, all times 2^n

Where scale is 0, r is made 0, and so is q: code 0, or the middle.
"""

import triton
import triton.language as tl

FUSED = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter has no fused multiply-add and no PTX
FP16_MAX = tl.constexpr(65504.0)
UNIT = tl.constexpr(2.0**-24)
UNITS = tl.constexpr(2.0**24)


@triton.jit
def to_fp16(x):
    return tl.minimum(tl.maximum(x, -FP16_MAX), FP16_MAX).to(tl.float16).to(tl.float32)


@triton.jit
def fma(a, b, c):
    """a b + c, rounded once (by the interpreter twice, which differs only next to where rounding turns)."""
    if FUSED:
        return tl.fma(a, b, c)
    return (a.to(tl.float64) * b + c).to(tl.float32)


@triton.jit
def quotient(d, s, r):
    """d / s rounded to nearest, where s has at most 11 bits and r is about 1 / s; 0 where r is 0."""
    q = d * r
    return fma(fma(-q, s, d), r, q)


@triton.jit
def scale_and_zero(low, high, BITS: tl.constexpr, META: tl.constexpr):
    """Scale and zero of groups, rounded to fp16; META = 1: symmetric, the scale has a sign and zero is 0."""
    if META == 2:
        top: tl.constexpr = (1 << BITS) - 1.0
        return to_fp16(quotient(high - low, top, 1 / top)), to_fp16(low)
    far = tl.where(high >= -low, high, low)
    return to_fp16(far * (-1.0 / (1 << (BITS - 1)))), tl.zeros_like(far)


@triton.jit
def divisor(scale, units):
    """What places divide by, units * scale, and about its reciprocal, or 0 where that is 0.

    scale: an fp16 number; units: UNITS, or a lower power of two for finer places.
    """
    s = scale * units
    if FUSED:
        r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [s], dtype=tl.float32, is_pure=True, pack=1)
    else:
        r = 1.0 / tl.where(s != 0, s, 1.0)
    return s, tl.where(scale != 0, r, 0.0)


@triton.jit
def places(x, zero, s, r, half, BITS: tl.constexpr, META: tl.constexpr):
    """Places of x fp32; s, r from divisor, half: UNIT / 2, or more for finer places.  BITS matters if symmetric."""
    if META == 2:
        return add_to_unit(quotient(x - zero, s, r), half)
    return add_down_to_unit(quotient(x, s, r) + half, UNIT * (1 << (BITS - 1)))


@triton.jit
def add_to_unit(a, b):
    """a + b rounded to nearest, or the nearer of 0 and 1."""
    if FUSED:
        return tl.inline_asm_elementwise("add.rn.sat.f32 $0, $1, $2;", "=f,f,f", [a, b + tl.zeros_like(a)],
                                         dtype=tl.float32, is_pure=True, pack=1)
    return tl.minimum(tl.maximum(a + b, 0.0), 1.0)


@triton.jit
def add_down_to_unit(a, b: tl.constexpr):
    """a + b rounded down, or the nearer of 0 and 1 (by the interpreter to a multiple of UNIT, as b must be)."""
    if FUSED:
        return tl.inline_asm_elementwise("add.rm.sat.f32 $0, $1, $2;", "=f,f,f", [a, tl.full(a.shape, b, tl.float32)],
                                         dtype=tl.float32, is_pure=True, pack=1)
    return tl.minimum(tl.maximum(tl.floor(a * UNITS) * UNIT + b, 0.0), 1.0)


@triton.jit
def integers_of(place, TOP: tl.constexpr):
    """The integer of a place, at most TOP, in the low 16 bits of int32; what is above them is left undefined."""
    place = tl.minimum(place, TOP * UNIT)
    if FUSED:
        return tl.inline_asm_elementwise("add.rz.f32 $0, $1, 0f3f000000;", "=r,f", [place], dtype=tl.int32,
                                         is_pure=True, pack=1)
    return tl.floor(place * UNITS).to(tl.int32)


@triton.jit
def integer_pairs(even, odd, TOP: tl.constexpr, SM90: tl.constexpr):
    """The integers of two places, at most TOP, as the halves of int32.  SM90: the device has integers in pairs."""
    if SM90:
        return tl.inline_asm_elementwise(
            "{.reg .b32 a; cvt.rz.f16x2.f32 a, $2, $1; min.u16x2 $0, a, $3;}", "=r,f,f,r",
            [even, odd, tl.full(even.shape, TOP | TOP << 16, tl.int32)], dtype=tl.int32, is_pure=True, pack=1)
    if FUSED:
        return tl.inline_asm_elementwise(
            "cvt.rz.f16x2.f32 $0, $2, $1;", "=r,f,f", [tl.minimum(even, TOP * UNIT), tl.minimum(odd, TOP * UNIT)],
            dtype=tl.int32, is_pure=True, pack=1)
    return integers_of(even, TOP) | integers_of(odd, TOP) << 16


@triton.jit
def quantize(x, scale, zero, BITS: tl.constexpr, META: tl.constexpr):
    """Codes of x fp32, as integers_of has them; scale and zero broadcast to it.

    A scale of zero: code 0, or the middle if symmetric.
    """
    s, r = divisor(scale, UNITS)
    return integers_of(places(x, zero, s, r, 0.5 * UNIT, BITS, META), (1 << BITS) - 1)
