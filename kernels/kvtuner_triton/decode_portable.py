"""Decode attention over packed pages in plain Triton: for cards without the Gluon kernel, and for the interpreter.

The same plan, buffers and merge as decode_hopper.py, whose docstring describes them, and the same bytes in fragment
order; here each program finds them by the formulas of fragments.py, a byte an element, and multiplies out
x' = code * scale + zero in fp32.  Simple, and several times slower.

Tolerance: if q is 16 bit, q, x', p and the page in progress are rounded to fp16 for dot products with fp32 sums, and
the error is at most 2x that of bf16 PyTorch; if q is fp32 nothing is: at most 2x that of fp32 PyTorch and 2^-23 of the
largest score.
"""

import triton
import triton.language as tl

from kvtuner_triton.slots import boost_slot

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["batch", "table_stride"])
def portable_kernel(q_ptr, key_codes, key_meta, key_extra, value_codes, value_meta, tail_key, tail_value, table, plan,
                    partial, lse, sm_scale, batch, table_stride, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
                    D: tl.constexpr, PAGE: tl.constexpr, KEY_BITS: tl.constexpr, KEY_META: tl.constexpr,
                    VALUE_BITS: tl.constexpr, VALUE_META: tl.constexpr, BOOSTED: tl.constexpr, HEADS: tl.constexpr):
    """Program (head, row) does row `row` of the plan for kv head `head`; HEADS is GROUP padded to what a dot takes."""
    TILE: tl.constexpr = 32
    TILES: tl.constexpr = PAGE // TILE  # in a page
    head = tl.program_id(0)
    row = tl.program_id(1)
    request = tl.load(plan + row * 4)
    slot = tl.load(plan + row * 4 + 1).to(tl.int64)
    first = tl.load(plan + row * 4 + 2)
    last = tl.load(plan + row * 4 + 3)
    if request >= 0:
        q = load_query(q_ptr + (request * KV_HEADS + head).to(tl.int64) * (GROUP * D), GROUP, D, HEADS)
        log2_scale = sm_scale * LOG2_E
        channel = tl.arange(0, D)
        token = tl.arange(0, TILE)
        top = tl.full([HEADS], float("-inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        o = tl.zeros([HEADS, D], tl.float32)
        if row < batch:
            for start in range(0, last, TILE):
                inside = start + token < last
                at = ((slot * PAGE + start + token) * KV_HEADS + head)[:, None] * D + channel[None, :]
                k = tl.load(tail_key + at, mask=inside[:, None], other=0.0).to(q.dtype)
                v = tl.load(tail_value + at, mask=inside[:, None], other=0.0).to(q.dtype)
                score = tl.dot(q, tl.trans(k), input_precision="ieee") * log2_scale
                score = tl.where(inside[None, :], score, float("-inf"))
                top, total, o = attend(score, v, top, total, o)
        else:
            for i in range(first * TILES, last * TILES):
                page = tl.load(table + slot * table_stride + i // TILES * PAGE) // PAGE
                at = page.to(tl.int64) * KV_HEADS + head
                tile = i % TILES
                scale, zero = load_meta(key_meta + at * (KEY_META * D) + channel, D, KEY_BITS, KEY_META)
                code = key_codes_at(key_codes + (at * PAGE + tile * TILE) * (D * KEY_BITS // 8), token[:, None],
                                    channel[None, :], D, KEY_BITS)
                if BOOSTED:
                    half = second_halves_at(key_extra + at * (PAGE * D // 32) + tile * D, token[:, None],
                                            channel[None, :], D)
                    code = tl.where(scale[None, :] < 0, code * 16 + half, code)
                    scale = tl.abs(scale)
                k = (code * scale[None, :] + zero[None, :]).to(q.dtype)
                meta = value_meta + (at * PAGE + tile * TILE + token) * VALUE_META
                scale, zero = load_meta(meta, 1, VALUE_BITS, VALUE_META)
                code = value_codes_at(value_codes + (at * PAGE + tile * TILE) * (D * VALUE_BITS // 8), token[:, None],
                                      channel[None, :], D, VALUE_BITS)
                v = (code * scale[:, None] + zero[:, None]).to(q.dtype)
                score = tl.dot(q, tl.trans(k), input_precision="ieee") * log2_scale
                top, total, o = attend(score, v, top, total, o)
        store_partial(partial, lse, row, head, top, total, o, KV_HEADS, GROUP, D, HEADS)


@triton.jit
def load_meta(meta, distance, BITS: tl.constexpr, META: tl.constexpr):
    """Scale at `meta` and zero `distance` after it, as fp32; META = 1: symmetric, the middle code is zero."""
    scale = tl.load(meta).to(tl.float32)
    if META == 2:
        return scale, tl.load(meta + distance).to(tl.float32)
    return scale, scale * -(1 << (BITS - 1))


@triton.jit
def key_codes_at(tile, token, channel, D: tl.constexpr, BITS: tl.constexpr):
    """Codes of keys as fp32: token < 32 and channel may be of any shapes that broadcast."""
    u = channel % (D // 4) // 2
    word = u // (8 // BITS) * 2 + token // 2 % 2
    return field(tile, word, token // 4, channel // (D // 4), channel % 2, token % 2, u, BITS)


@triton.jit
def value_codes_at(tile, token, channel, D: tl.constexpr, BITS: tl.constexpr):
    """Codes of values, likewise."""
    u = token % 4
    word = u // (8 // BITS) * (D // 16) + channel % (D // 8) // 2
    return field(tile, word, channel // (D // 8), token // 8, token // 4 % 2, channel % 2, u, BITS)


@triton.jit
def second_halves_at(tile, token, channel, D: tl.constexpr):
    """Second halves of the slots of keys' channels as fp32, of any shapes that broadcast."""
    slot = boost_slot(channel)
    byte = tl.load(tile + 2 * (token // 4 * (D // 16) + slot) + token % 4 // 2)
    return ((byte.to(tl.int32) >> (token % 2 * 4)) & 15).to(tl.float32)


@triton.jit
def field(tile, word, g, t, e, half, u, BITS: tl.constexpr):
    byte = tl.load(tile + word // 4 * 512 + (g * 4 + t) * 16 + word % 4 * 4 + e * 2 + half)
    return ((byte.to(tl.int32) >> (u % (8 // BITS) * BITS)) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def load_query(q_ptr, GROUP: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr):
    """(GROUP, D) -> (HEADS, D), rows past GROUP zero; fp16, but fp32 if the model is."""
    h = tl.arange(0, HEADS)
    q = tl.load(q_ptr + h[:, None] * D + tl.arange(0, D)[None, :], mask=(h < GROUP)[:, None], other=0.0)
    return q if q.dtype == tl.float32 else q.to(tl.float16)


@triton.jit
def attend(score, v, top, total, o):
    """A step of the online softmax, base 2: score (HEADS, tokens) fp32, v (tokens, D) of what dots are taken in."""
    new_top = tl.maximum(top, tl.max(score, axis=1))
    alpha = tl.exp2(top - new_top)
    p = tl.exp2(score - new_top[:, None])
    o = tl.dot(p.to(v.dtype), v, o * alpha[:, None], input_precision="ieee")
    return new_top, total * alpha + tl.sum(p, axis=1), o


@triton.jit
def store_partial(partial, lse, row, head, top, total, o, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
                  D: tl.constexpr, HEADS: tl.constexpr):
    """Write o / total, and log2 of the softmax's denominator, top + log2 total."""
    h = tl.arange(0, HEADS)
    at = (row * KV_HEADS + head).to(tl.int64) * GROUP + h
    tl.store(partial + at[:, None] * D + tl.arange(0, D)[None, :], o / total[:, None], mask=(h < GROUP)[:, None])
    tl.store(lse + at, top + tl.log2(total), mask=h < GROUP)
