"""Quantize keys of a page, one scale a channel, and put the codes where fragments.py says.

A program does 64 channels of a page: slots of boosted channels end there.  A lane holds 8 channels, four words, of some
tokens.  Rows are (m, half, tile | g) of token = 32 tile + 4 g + 2 m + half, and lanes go by g, so that a lane holds all
four tokens of a g, and codes of two channels and two tokens become a word of fragment order without leaving it; warps
go by half of the channels, and then by tile.
"""

import triton
import triton.language as tl

from kvtuner_triton.pairs import even, fp16_pairs, gather_two, odd, ranges_of_channels, words_at
from kvtuner_triton.rounding import UNIT, UNITS, divisor, integer_pairs, places, quotient, scale_and_zero, to_fp16
from kvtuner_triton.slots import boost_slot

CHANNELS = tl.constexpr(64)  # a program
PAIRS = tl.constexpr(32)
COARSE = tl.constexpr(16.0)  # of a boosted page's other channels: their places are that much finer


@triton.jit
def key_tokens(PAGE: tl.constexpr):
    """Which token is in which row, (PAGE / 8, 1, 8, 1)."""
    TILES: tl.constexpr = PAGE // 32
    row = tl.arange(0, PAGE // 8)[:, None, None, None]  # m, half, tile
    return row % TILES * 32 + row // TILES + tl.arange(0, 8)[None, None, :, None] * 4


@triton.jit
def key_words(part):
    """Which words of a token `part` is, (1, 2, 1, 16)."""
    return part * PAIRS + tl.arange(0, 2)[None, :, None, None] * 16 + tl.arange(0, 16)[None, None, None, :]


@triton.jit
def by_channel(a, b):
    """Words a, b (PAIRS), to be broadcast over tokens: (1, 2, 1, 16).

    Lanes wait for each other here, so what a lane can work out again from fewer words does not come this way.
    """
    a, b = gather_two(a, b, tl.arange(0, PAIRS))
    return tl.reshape(a, [2, 16])[None, :, None, :], tl.reshape(b, [2, 16])[None, :, None, :]


@triton.jit
def store_keys(w, part, at, codes, meta, extra, query, D: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr,
               META: tl.constexpr, GROUP: tl.constexpr, dtype: tl.constexpr, SM90: tl.constexpr):
    """Words (PAGE / 8, 2, 8, 16), as above, become `part` of page and head `at` of codes, meta, extra.

    query: (GROUP, D) at the page's last position, if GROUP is not 0: keys are boosted.
    Stores come last, since `at` takes loads that depend on each other.
    """
    codes += at * (PAGE * D * BITS // 8)
    meta = words_at(meta + at * (D * META)) + part * PAIRS + tl.arange(0, PAIRS)
    if GROUP > 0:
        extra += at * (PAGE * D // 32)
        store_boosted_keys(w, part, codes, meta, words_at(query), extra, D, PAGE, GROUP, dtype, SM90)
    else:
        store_plain_keys(w, part, codes, meta, D, BITS, META, dtype, SM90)


@triton.jit
def store_plain_keys(w, part, codes, meta, D: tl.constexpr, BITS: tl.constexpr, META: tl.constexpr,
                     dtype: tl.constexpr, SM90: tl.constexpr):
    low_even, high_even, low_odd, high_odd = ranges_of_channels(w, dtype)
    scale_even, zero_even = scale_and_zero(low_even, high_even, BITS, META)
    scale_odd, zero_odd = scale_and_zero(low_odd, high_odd, BITS, META)
    scales, zeros = fp16_pairs(scale_even, scale_odd), fp16_pairs(zero_even, zero_odd)
    scale, zero = by_channel(scales, zeros)
    s, r = divisor(even(scale, tl.float16), UNITS)
    a = places(even(w, dtype), even(zero, tl.float16), s, r, 0.5 * UNIT, BITS, META)
    s, r = divisor(odd(scale, tl.float16), UNITS)
    b = places(odd(w, dtype), odd(zero, tl.float16), s, r, 0.5 * UNIT, BITS, META)
    code = integer_pairs(a, b, (1 << BITS) - 1, SM90)
    if BITS == 4:
        x, y = tl.split(tl.reshape(code, [code.shape[0], 2, 8, 8, 2]))
        code = x + y * 16
    elif BITS == 2:
        x, y = tl.split(tl.reshape(code, [code.shape[0], 2, 8, 8, 2]))
        x, y = tl.split(tl.reshape(x + y * 4, [code.shape[0], 2, 8, 4, 2]))
        code = x + y * 16
    store_key_words(code, part, codes, D, BITS)
    tl.store(meta, scales)
    if META == 2:
        tl.store(meta + D // 2, zeros)


@triton.jit
def store_boosted_keys(w, part, codes, meta, query, extra, D: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr,
                       dtype: tl.constexpr, SM90: tl.constexpr):
    """The same with four bits, and eight in one channel of each slot."""
    pair = tl.arange(0, PAIRS)
    weight_even, weight_odd = square_sums(query + part * PAIRS, pair, D, GROUP, dtype)  # first: loads, as those of w
    low_even, high_even, low_odd, high_odd = ranges_of_channels(w, dtype)
    span_even, span_odd = high_even - low_even, high_odd - low_odd
    slot = boost_slot(2 * pair) // 2  # that of the even channel is 2 slot, of the odd one 2 slot + 1
    best_even = most_important(weight_even * (span_even * span_even), slot, pair)
    best_odd = most_important(weight_odd * (span_odd * span_odd), slot, pair)
    scale_even, scale_odd = boosted_scale(span_even, best_even), boosted_scale(span_odd, best_odd)
    zero_even, zero_odd = to_fp16(low_even), to_fp16(low_odd)
    mark = tl.where(best_even, 0x8000, 0) | tl.where(best_odd, -0x80000000, 0)  # set as a bit: -0 marks, too
    scales, zeros = fp16_pairs(scale_even, scale_odd) | mark, fp16_pairs(zero_even, zero_odd)
    scale, zero = by_channel(scales, zeros)
    best_even, best_odd = (scale & 0x8000) != 0, scale < 0
    a = boosted_places(even(w, dtype), even(scale, tl.float16), even(zero, tl.float16), best_even)
    b = boosted_places(odd(w, dtype), odd(scale, tl.float16), odd(zero, tl.float16), best_odd)
    code = integer_pairs(a, b, 255, SM90)  # of all channels in eight bits, of which others than the best keep four
    x, y = tl.split(tl.reshape(code, [PAGE // 8, 2, 8, 8, 2]))
    store_key_words(x >> 4 & 0x000F000F | y & 0x00F000F0, part, codes, D, 4)
    store_second_halves(code, best_even, best_odd, part, extra, D, PAGE)
    tl.store(meta, scales)
    tl.store(meta + D // 2, zeros)


@triton.jit
def store_second_halves(code, best_even, best_odd, part, extra, D: tl.constexpr, PAGE: tl.constexpr):
    """Of code (PAGE / 8, 2, 8, 16), bytes in halves of int32, the low four bits of the best channels."""
    TILES: tl.constexpr = PAGE // 32
    # Of a lane's four pairs every other one is of the same slots: at most one of the two has a slot's best channel.
    mine = tl.where(best_even, 0xFFFF, 0) | tl.where(best_odd, -65536, 0)
    x = tl.sum(tl.reshape(code & mine & 0x000F000F, [PAGE // 8, 2, 8, 4, 2, 2]), axis=4)
    mine = tl.sum(tl.reshape(mine, [1, 2, 1, 4, 2, 2]), axis=4)
    # Four tokens fill 16 bits.
    x = tl.reshape(x, [2, 2, TILES, 2, 8, 4, 2])  # m, half, tile, half of the channels, g, lane, which slots
    x, y = tl.split(tl.permute(x, (0, 2, 3, 4, 5, 6, 1)))
    x, y = tl.split(tl.permute(x + y * 16, (1, 2, 3, 4, 5, 0)))
    x, y = tl.split(x + y * 256)
    mine_x, mine_y = tl.split(mine)
    place = tl.arange(0, TILES)[:, None, None, None] * 8 + tl.arange(0, 8)[None, None, :, None]
    at = extra.to(tl.pointer_type(tl.int16)) + place * (D // 16) + part * 4 + tl.zeros_like(x)
    half = tl.arange(0, 2)[None, :, None, None]  # in the second one boost_slot has slots 2, 3 before 0, 1
    store_slots(x, at + 2 * half, mine_x)
    store_slots(y, at + (2 - 2 * half), mine_y)


@triton.jit
def store_slots(x, at, mine):
    """Halves of x, of a slot with an even channel and of the next one, where those of `mine` are ones."""
    tl.store(at, x.to(tl.int16), mask=(mine & 0xFFFF) != 0)
    tl.store(at + 1, (x >> 16).to(tl.int16), mask=mine < 0)


@triton.jit
def square_sums(query, pair, D: tl.constexpr, GROUP: tl.constexpr, dtype: tl.constexpr):
    """Sum over the query heads of q^2, (pairs) fp32 of even channels and of odd ones."""
    x, y = tl.zeros([PAIRS], tl.float32), tl.zeros([PAIRS], tl.float32)
    for head in tl.static_range(GROUP):
        w = tl.load(query + head * (D // 2) + pair)
        a, b = even(w, dtype), odd(w, dtype)
        x += a * a
        y += b * b
    return x, y


@triton.jit
def most_important(importance, slot, pair):
    """Which channel of each slot, 0 or 1 here, has the largest importance, the lower at a tie: (pairs) bool."""
    importance = importance.to(tl.int32, bitcast=True)  # never negative: in the same order, and one instruction
    first, second = tl.where(slot == 0, importance, -1), tl.where(slot == 0, -1, importance)
    best = tl.where(slot == 0, tl.max(first, axis=0), tl.max(second, axis=0))
    at = tl.where(importance == best, pair, PAIRS)
    first, second = tl.where(slot == 0, at, PAIRS), tl.where(slot == 0, PAIRS, at)
    return pair == tl.where(slot == 0, tl.min(first, axis=0), tl.min(second, axis=0))


@triton.jit
def boosted_scale(span, best):
    """span / 255 for the best channels, / 15 for others, rounded to fp16."""
    return to_fp16(quotient(span, tl.where(best, 255.0, 15.0), tl.where(best, 1.0 / 255, 1.0 / 15)))


@triton.jit
def boosted_places(x, scale, zero, best):
    """Places of x (PAGE / 8, 2, 8, 16), of eight bits; scale, whose sign is a mark, zero, best (1, 2, 1, 16)."""
    s, r = divisor(tl.abs(scale), tl.where(best, UNITS, UNITS / COARSE))
    return places(x, zero, s, r, tl.where(best, 0.5 * UNIT, 0.5 * UNIT * COARSE), 8, 2)


@triton.jit
def store_key_words(code, part, codes, D: tl.constexpr, BITS: tl.constexpr):
    """code (PAGE / 8, 2, 8, 2 BITS): bytes of the even channel and of the odd one in halves of int32."""
    TILES: tl.constexpr = code.shape[0] // 4
    PER: tl.constexpr = 8 // BITS
    T: tl.constexpr = 128 // D  # of the four lanes of fragment order that hold a token, those with these, halved
    RUN: tl.constexpr = 4 // PER  # u // per, of a lane here
    TWO: tl.constexpr = 2 if RUN > 1 else 1  # of them with neighbouring words
    RUNS: tl.constexpr = D // 32
    x = tl.reshape(code, [2, 2, TILES, 2, 8, 4 * RUN])  # m, half, tile, t // T, g, the rest
    x, y = tl.split(tl.permute(x, (0, 2, 3, 4, 5, 1)))
    x = tl.reshape(x + y * 256, [2, TILES, 16, 4, RUN // TWO, TWO])
    ROWS: tl.constexpr = TILES * 64
    x = tl.reshape(tl.permute(x, (4, 1, 2, 3, 5, 0)), [RUN // TWO, ROWS, 2 * TWO])
    row, long = tl.arange(0, ROWS)[None, :], tl.arange(0, RUN // TWO)[:, None]
    word = (row % RUNS * RUN + long * TWO) * 2
    lane = row // 4 % 8 * 4 + part * (2 * T) + row // 32 % 2 * T + row // RUNS % T
    at = row // 64 * (8 * D // PER) + word // 4 * 128 + lane * 4 + word % 4
    tl.store(words_at(codes) + at[:, :, None] + tl.arange(0, 2 * TWO)[None, None, :], x)
