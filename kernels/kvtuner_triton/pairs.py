"""Keys and values inside kernels two channels at a time: a word is two neighbours, the even channel in its low half.

A word of 16-bit numbers is an int32, of fp32 numbers an int64.  Minimum and maximum of two words take one instruction
each where numbers have 16 bits (min.bf16x2: of -0 and +0 the minimum is -0, as everywhere in a kernel).
"""

import triton
import triton.language as tl

from kvtuner_triton.rounding import FUSED


@triton.jit
def words_at(pointer):
    """A pointer to words."""
    if pointer.dtype.element_ty == tl.float32:
        return pointer.to(tl.pointer_type(tl.int64))
    else:
        return pointer.to(tl.pointer_type(tl.int32))


@triton.jit
def even(w, dtype: tl.constexpr):
    """fp32 of the even channels of words of `dtype`."""
    if dtype == tl.bfloat16:
        return (w << 16).to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        return w.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return w.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def odd(w, dtype: tl.constexpr):
    """fp32 of the odd channels of words of `dtype`."""
    if dtype == tl.bfloat16:
        return (w & -65536).to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        return (w >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (w >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def fp16_pairs(even, odd):
    """Two fp32 numbers that are fp16 numbers, as halves of int32."""
    low = even.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    return low & 65535 | odd.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16


@triton.jit
def of_halves(asm: tl.constexpr, a, b):
    """One instruction that does the same to both halves of two words."""
    return tl.inline_asm_elementwise(asm, "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def min_bf16(a, b):
    return of_halves("min.bf16x2 $0, $1, $2;", a, b)


@triton.jit
def max_bf16(a, b):
    return of_halves("max.bf16x2 $0, $1, $2;", a, b)


@triton.jit
def min_fp16(a, b):
    return of_halves("min.f16x2 $0, $1, $2;", a, b)


@triton.jit
def max_fp16(a, b):
    return of_halves("max.f16x2 $0, $1, $2;", a, b)


@triton.jit
def lowest(w, AXIS: tl.constexpr, dtype: tl.constexpr):
    """Words with the minima of both halves along an axis, 16-bit dtype, not under the interpreter."""
    if dtype == tl.bfloat16:
        return tl.reduce(w, AXIS, min_bf16)
    return tl.reduce(w, AXIS, min_fp16)


@triton.jit
def highest(w, AXIS: tl.constexpr, dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        return tl.reduce(w, AXIS, max_bf16)
    return tl.reduce(w, AXIS, max_fp16)


@triton.jit
def gather_two(a, b, index):
    """a[index], b[index] (n,) of 32 bits each, held by one lane an element.

    tl.gather is the one operation whose operands' layout the compiler chooses anew: where the index is just tl.arange,
    this keeps it from repeating what follows in all lanes of a row, or what went before.
    """
    x = a.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF | b.to(tl.int32, bitcast=True).to(tl.int64) << 32
    x = tl.gather(x, index, 0)
    return x.to(tl.int32).to(a.dtype, bitcast=True), (x >> 32).to(tl.int32).to(b.dtype, bitcast=True)


@triton.jit
def ranges_of_channels(w, dtype: tl.constexpr):
    """Of words (.., n, .., m) the lowest and highest of even, then of odd channels, (n m) fp32 each."""
    PAIRS: tl.constexpr = w.shape[1] * w.shape[3]
    if FUSED and dtype != tl.float32:
        low, high = lowest(lowest(w, 0, dtype), 1, dtype), highest(highest(w, 0, dtype), 1, dtype)
        low, high = gather_two(tl.reshape(low, [PAIRS]), tl.reshape(high, [PAIRS]), tl.arange(0, PAIRS))
        return even(low, dtype), even(high, dtype), odd(low, dtype), odd(high, dtype)
    else:
        a, b = even(w, dtype), odd(w, dtype)
        low_even, high_even = tl.min(tl.min(a, axis=0), axis=1), tl.max(tl.max(a, axis=0), axis=1)
        low_odd, high_odd = tl.min(tl.min(b, axis=0), axis=1), tl.max(tl.max(b, axis=0), axis=1)
        return (tl.reshape(low_even, [PAIRS]), tl.reshape(high_even, [PAIRS]), tl.reshape(low_odd, [PAIRS]),
                tl.reshape(high_odd, [PAIRS]))


@triton.jit
def ranges_of_tokens(w, dtype: tl.constexpr):
    """Of words (tokens, pairs) the lowest and highest of tokens, (tokens) fp32 each."""
    if FUSED and dtype != tl.float32:
        # A lane's own first, then [low, -high] in one word between lanes.
        x = tl.reshape(w, [w.shape[0], w.shape[1] // 4, 4])
        low, high = lowest(x, 2, dtype), highest(x, 2, dtype) ^ -2147450880
        both = tl.join(low & 65535 | high << 16, (low >> 16) & 65535 | high & -65536)
        both = lowest(lowest(both, 2, dtype), 1, dtype)
        return even(both, dtype), -odd(both, dtype)
    else:
        a, b = even(w, dtype), odd(w, dtype)
        low, high = tl.minimum(tl.min(a, axis=1), tl.min(b, axis=1)), tl.maximum(tl.max(a, axis=1), tl.max(b, axis=1))
        return low, high
