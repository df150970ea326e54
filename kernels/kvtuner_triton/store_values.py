"""Quantize values of a page, one scale a token, and put the codes where fragments.py says.

A lane holds 8 channels, four words, of some tokens.  Rows are (e, u, tile, t) of token = 32 tile + 8 t + 4 e + u, and
lanes go by t, so that a lane holds all eight tokens of a t, and codes of two channels and two or four tokens become a
word of fragment order without leaving it.
"""

import triton
import triton.language as tl

from kvtuner_triton.pairs import even, fp16_pairs, gather_two, odd, ranges_of_tokens, words_at
from kvtuner_triton.rounding import FUSED, UNIT, UNITS, divisor, integer_pairs, places, scale_and_zero


@triton.jit
def value_tokens(start, TOKENS: tl.constexpr):
    """Which token is in which row, (TOKENS, 1), of those from `start` on."""
    return (start + token_of_row(tl.arange(0, TOKENS), TOKENS))[:, None]


@triton.jit
def value_words(D: tl.constexpr):
    """The words of a token, (1, D / 2)."""
    return tl.arange(0, D // 2)[None, :]


@triton.jit
def token_of_row(row, TOKENS: tl.constexpr):
    TILES: tl.constexpr = TOKENS // 32
    return row // 4 % TILES * 32 + row % 4 * 8 + row // (4 * TILES)


@triton.jit
def row_of_token(token, TOKENS: tl.constexpr):
    TILES: tl.constexpr = TOKENS // 32
    return (token % 8 * TILES + token // 32) * 4 + token % 32 // 8


@triton.jit
def store_values(w, at, codes, meta, D: tl.constexpr, BITS: tl.constexpr, META: tl.constexpr, dtype: tl.constexpr,
                 SM90: tl.constexpr):
    """Words (TOKENS, D / 2) as above become tokens `at` .. of codes (.., D * BITS / 8) and meta (.., META)."""
    TOKENS: tl.constexpr = w.shape[0]
    codes += at * (D * BITS // 8)
    meta += at * META
    low, high = ranges_of_tokens(w, dtype)
    token = tl.arange(0, TOKENS)  # one lane a token from here on
    low, high = gather_two(low, high, row_of_token(token, TOKENS))
    scale, zero = scale_and_zero(low, high, BITS, META)
    s, r = divisor(scale, UNITS)
    row = token_of_row(token, TOKENS)
    s, r = gather_two(s, r, row)
    from_zero = zero
    if META == 2:
        from_zero = tl.gather(zero, row, 0)
    a = places(even(w, dtype), from_zero[:, None], s[:, None], r[:, None], 0.5 * UNIT, BITS, META)
    b = places(odd(w, dtype), from_zero[:, None], s[:, None], r[:, None], 0.5 * UNIT, BITS, META)
    store_value_words(integer_pairs(a, b, (1 << BITS) - 1, SM90), codes, D, BITS)
    # Last: `at` takes loads that depend on each other.
    if META == 2:
        tl.store(words_at(meta) + token, fp16_pairs(scale, zero))
    else:
        tl.store(meta + token, scale.to(tl.float16))


@triton.jit
def store_value_words(code, codes, D: tl.constexpr, BITS: tl.constexpr):
    """code (TOKENS, D / 2): codes of the even channel and of the odd one in halves of int32."""
    TILES: tl.constexpr = code.shape[0] // 32
    US: tl.constexpr = BITS // 2  # u // per
    M: tl.constexpr = D // 64  # m // 4
    if BITS == 8:
        x = tl.reshape(code, [2, 4, TILES, 4, 8, M, 4])  # e, u // per, tile, t, g, m // 4, m mod 4
    else:
        x = tl.reshape(code, [2, 2, 2, TILES, 4, 8, M, 4])
        x, y = tl.split(tl.permute(x, (0, 1, 3, 4, 5, 6, 7, 2)))
        if BITS == 4:
            x = x + y * 16
        else:
            x, y = tl.split(tl.permute(x + y * 4, (0, 2, 3, 4, 5, 6, 1)))
            x = tl.reshape(x + y * 16, [2, 1, TILES, 4, 8, M, 4])
    x, y = tl.split(tl.permute(x, (1, 2, 3, 4, 5, 6, 0)))
    x = bytes_of_halves(x, y)  # u // per, tile, t, g, m // 4, m mod 4
    ROWS: tl.constexpr = US * TILES * 32 * M
    row = tl.arange(0, ROWS)[:, None]
    lane = row // M % 8 * 4 + row // (8 * M) % 4
    tile = row // (32 * M) % TILES
    at = tile * (D * BITS) + (row // (32 * M * TILES) * M + row % M) * 128 + lane * 4
    tl.store(words_at(codes) + at + tl.arange(0, 4)[None, :], tl.reshape(x, [ROWS, 4]))


@triton.jit
def bytes_of_halves(x, y):
    """Of x and y the last byte of both halves: x low, x high, y low, y high."""
    if FUSED:
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x6420;", "=r,r,r", [x, y], dtype=tl.int32, is_pure=True,
                                         pack=1)
    return x & 255 | x >> 8 & 0xFF00 | (y & 255 | y >> 8 & 0xFF00) << 16
