"""Store new keys and values: quantize and pack complete pages, keep the page in progress.

One launch a layer, before attention, which reads the new pages as stored (unpack.py).  An extend's queries also read
what their first page had before (prefix.py): a request that begins inside a page and completes it keeps its new page in
progress in a second launch, after attention.

Bit for bit what reference.py and fragments.py give on a CPU.  With low, high over a group (keys: a channel of the page;
values: a token), all in fp32:

    zero = fp16(low), scale = fp16((high - low) / top),  code = clamp(floor((x - zero) / scale + 1/2), 0, top)

and the symmetric form of reference.py, whose scale, far / -2^(b-1), is exact until rounded to fp16.  Of boosted keys
top is 255 in the channel of each slot with the largest w (high - low)^2, and 15 in the others; w is the sum of q^2 over
the kv head's query heads at the page's last position, which is new whenever a page is completed.

Nothing but w is a sum of products, and its order is free, so there is nothing to contract, and every quotient d / s is
rounded as IEEE says, in three instructions instead of eleven: q = d r with r about 1 / s, then q + r (d - q s) in two
FMAs.  s has at most 11 bits (an fp16, or top), so d - q s is exact, and a quotient of 24 by 11 bits stays 2^-12 ulp
away from where rounding turns, while r, good to 2^-22, leaves 2^-20 ulp.  (Where q is so small that this fails, adding
1/2 forgets it.  torch on CUDA multiplies by the reciprocal of a number instead of dividing, and may differ from torch
on a CPU by a bit.)

Request b has new tokens at positions seq_lens[b] - new .. seq_lens[b] - 1, rows rows[b] .. of key and value.  Each page
they complete is one item, quantized from the rows and, for the first, from the slot's tail; the page of the last token
is another, kept in the tail, complete or not, since that token's own query reads it there.  Decoding: one new token,
and one item a request that does both, so the grid depends on the batch alone; padded requests have slot 0 and length 1
and write to tail 0.  No item reads from a tail what another one writes: new tokens of a page come from the rows.

    key, value (tokens, kv_heads, D), q (tokens, q_heads, D), rows strided, 16 bit or fp32; q only for boosted keys
    codes, meta, extra as layout.py has them, codes in fragment order, extra in that of slots
    tail_key, tail_value (slots, PAGE, kv_heads, D)       table = req_to_token (slots, table_stride) int32

A program does 64 channels of a page's keys or 32 tokens of its values: slots of boosted channels and tiles of codes end
there, and so few numbers a thread leave room for enough of them on a multiprocessor to wait for memory side by side.

Bytes a token and kv head at D = 128, PAGE = 64: 512 read; kv8 268, kv4 140 (boosted, symmetric values 142), kv2 76
written.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kvtuner_triton.decode import PackedPages
from kvtuner_triton.slots import boost_slot

FUSED = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter has no fused multiply-add
FP16_MAX = tl.constexpr(65504.0)
CHANNELS = tl.constexpr(64)  # of keys, a program
TOKENS = tl.constexpr(32)  # of values, a program


@triton.jit(do_not_specialize=["table_stride"])
def page_kernel(key, value, key_codes, key_meta, value_codes, value_meta, tail_key, tail_value, table, slots, seq_lens,
                new_lens, rows, items, key_stride, value_stride, table_stride, q, key_extra, q_stride,
                KV_HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, KEY_BITS: tl.constexpr,
                KEY_META: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_META: tl.constexpr, DECODE: tl.constexpr,
                GROUP: tl.constexpr):
    """Program (i, head, part) does a part of item i and kv head `head`: D / 64 of keys first, then PAGE / 32 of values.

    GROUP: query heads a kv head, 0 if keys are not boosted; q and key_extra are None then.
    """
    KEY_PARTS: tl.constexpr = D // CHANNELS
    head = tl.program_id(1)
    part = tl.program_id(2)
    b = tl.program_id(0)
    if DECODE:
        end = tl.load(seq_lens + b).to(tl.int32)
        start, row, number = end - 1, b, 0
        complete, keep = end % PAGE == 0, True
    else:
        number = tl.load(items + 2 * b + 1)
        b = tl.load(items + 2 * b)
        end = tl.load(seq_lens + b).to(tl.int32)
        start = end - tl.load(new_lens + b).to(tl.int32)
        row = tl.load(rows + b).to(tl.int32)
        complete, keep = number >= 0, number < 0
    slot = tl.load(slots + b).to(tl.int64)
    first = (start // PAGE + number) * PAGE
    page = tl.load(table + slot * table_stride + first, mask=complete, other=0).to(tl.int64) // PAGE
    at = page * KV_HEADS + head
    row = row.to(tl.int64) - start  # of position 0
    if part < KEY_PARTS:
        channel = part * CHANNELS + tl.arange(0, CHANNELS)
        new, tail = key + head * D, tail_key + (slot * PAGE * KV_HEADS + head) * D
        if complete:
            codes, meta = key_codes + at * (PAGE * D * KEY_BITS // 8), key_meta + at * (D * KEY_META)
            if GROUP > 0:
                query = q + (row + first + PAGE - 1) * q_stride + head * (GROUP * D)
                store_boosted_keys(new, row, key_stride, tail, start, first, part, codes, meta, query,
                                   key_extra + at * (PAGE * D // 32), KV_HEADS, D, PAGE, GROUP)
            else:
                store_keys(new, row, key_stride, tail, start, first, part, codes, meta, KV_HEADS, D, PAGE, KEY_BITS,
                           KEY_META)
        if keep:
            keep_page(new, row, key_stride, tail, start, end, 0, channel, PAGE, KV_HEADS, D, PAGE, DECODE)
    else:
        token = (part - KEY_PARTS) * TOKENS
        new, tail = value + head * D, tail_value + (slot * PAGE * KV_HEADS + head) * D
        if complete:
            store_values(new, row, value_stride, tail, start, first, token,
                         value_codes + at * (PAGE * D * VALUE_BITS // 8) + token * (D * VALUE_BITS // 8),
                         value_meta + at * (PAGE * VALUE_META), KV_HEADS, D, VALUE_BITS, VALUE_META)
        if keep:
            keep_page(new, row, value_stride, tail, start, end, token, tl.arange(0, D), TOKENS, KV_HEADS, D, PAGE,
                      DECODE)


@triton.jit
def store_keys(new, row, stride, tail, start, first, part, codes, meta, KV_HEADS: tl.constexpr, D: tl.constexpr,
               PAGE: tl.constexpr, BITS: tl.constexpr, META: tl.constexpr):
    """CHANNELS of the page of positions first .. first + PAGE - 1: one scale a channel."""
    channel = part * CHANNELS + tl.arange(0, CHANNELS)
    x = load_page(new, row, stride, tail, start, first, tl.arange(0, PAGE), channel, KV_HEADS, D).to(tl.float32)
    scale, zero = scale_and_zero(tl.min(x, axis=0), tl.max(x, axis=0), BITS, META)
    tl.store(meta + channel, scale.to(tl.float16))
    if META == 2:
        tl.store(meta + D + channel, zero.to(tl.float16))
    store_key_codes(codes, quantize(x, scale[None, :], zero[None, :], BITS, META), part, D, PAGE, BITS)


@triton.jit
def store_boosted_keys(new, row, stride, tail, start, first, part, codes, meta, query, extra, KV_HEADS: tl.constexpr,
                       D: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr):
    """The same with four bits, and eight in one channel of each slot. query: (GROUP, D) at the page's last position."""
    SLOTS: tl.constexpr = CHANNELS // 16
    tl.static_assert(SLOTS == 4)
    channel, token = part * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, PAGE)
    x = load_page(new, row, stride, tail, start, first, token, channel, KV_HEADS, D).to(tl.float32)
    low = tl.min(x, axis=0)
    span = tl.max(x, axis=0) - low
    weight = tl.zeros_like(low)
    for g in tl.static_range(GROUP):
        y = tl.load(query + g * D + channel).to(tl.float32)
        weight += y * y
    best = most_important(weight * (span * span), channel, part * SLOTS + tl.arange(0, SLOTS))
    boosted = tl.max((channel[:, None] == best[None, :]).to(tl.int32), axis=1) > 0
    top = tl.where(boosted, 255.0, 15.0)
    scale, zero = to_fp16(divide(span, top)), to_fp16(low)
    mark = tl.where(boosted, 0x8000, 0)  # set as a bit: -0 marks, too
    tl.store(meta + channel, (scale.to(tl.float16).to(tl.int16, bitcast=True) | mark.to(tl.int16)).to(
        tl.float16, bitcast=True))
    tl.store(meta + D + channel, zero.to(tl.float16))
    code = quantize_up_to(x, scale[None, :], zero[None, :], top[None, :])
    store_key_codes(codes, code >> tl.where(boosted, 4, 0)[None, :], part, D, PAGE, 4)
    # Second halves: a token's four fill 16 bits, and there is one boosted channel a slot, so that a sum picks them.
    half = (code & tl.where(boosted, 15, 0)[None, :]) << (boost_slot(channel) % SLOTS * 4)[None, :]
    half = tl.reshape(tl.sum(half, axis=1), [PAGE // 4, 4, 1]) >> (tl.arange(0, SLOTS) * 4)[None, None, :] & 15
    unit = tl.sum(half << (tl.arange(0, 4) * 4)[None, :, None], axis=1)
    at = tl.arange(0, PAGE // 4)[:, None] * (D // 16) + part * SLOTS + tl.arange(0, SLOTS)[None, :]
    tl.store(extra.to(tl.pointer_type(tl.int16)) + at, unit.to(tl.int16))


@triton.jit
def most_important(importance, channel, slot):
    """Of each slot the channel with the largest importance, the lower at a tie; slots as in layout.py."""
    mine = boost_slot(channel)[:, None] == slot[None, :]
    return channel.shape[0] * (slot // 4) + tl.argmax(tl.where(mine, importance[:, None], -1.0), axis=0,
                                                      tie_break_left=True)


@triton.jit
def store_key_codes(codes, code, part, D: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr):
    """Codes (PAGE, CHANNELS) int32 of keys, one an element, to their places in a page in fragment order."""
    PER: tl.constexpr = 8 // BITS
    T: tl.constexpr = CHANNELS * 4 // D  # of the four lanes that hold a token, those with these channels
    code = code << (tl.arange(0, CHANNELS) % (D // 4) // 2 % PER * BITS)[None, :]
    byte = tl.reshape(code, [PAGE // 32, 8, 2, 2, T, D // 8 // PER, PER, 2])  # tile, g, m, half | t, u // per, f, e
    byte = tl.permute(tl.sum(byte, axis=6), (0, 5, 2, 1, 4, 6, 3))  # tile, u // per, m, g, t, e, half
    store_bytes(codes, byte, part * T, T)


@triton.jit
def store_values(new, row, stride, tail, start, first, token, codes, meta, KV_HEADS: tl.constexpr, D: tl.constexpr,
                 BITS: tl.constexpr, META: tl.constexpr):
    """TOKENS of a page, from `token` on: one scale a token.  Tokens u, 4 + u, .. are a tensor, u = 0 .. 3."""
    PER: tl.constexpr = 8 // BITS
    token += tl.arange(0, TOKENS // 4) * 4
    channel = tl.arange(0, D)
    a = load_page(new, row, stride, tail, start, first, token, channel, KV_HEADS, D)  # loads before the first store
    b = load_page(new, row, stride, tail, start, first, token + 1, channel, KV_HEADS, D)
    c = load_page(new, row, stride, tail, start, first, token + 2, channel, KV_HEADS, D)
    d = load_page(new, row, stride, tail, start, first, token + 3, channel, KV_HEADS, D)
    a = value_codes(a, meta + token * META, BITS, META)
    b = value_codes(b, meta + token * META + META, BITS, META)
    c = value_codes(c, meta + token * META + 2 * META, BITS, META)
    d = value_codes(d, meta + token * META + 3 * META, BITS, META)
    if PER == 1:
        byte = tl.join(tl.join(a, c), tl.join(b, d))
    elif PER == 2:
        byte = tl.join(a | (b << 4), c | (d << 4))
    else:
        byte = a | (b << 2) | (c << 4) | (d << 6)
    byte = tl.reshape(byte, [TOKENS // 32, 4, 2, 8, D // 16, 2, 4 // PER])  # tile, t, e | g, m, half, u // per
    byte = tl.permute(byte, (0, 6, 4, 3, 1, 2, 5))  # tile, u // per, m, g, t, e, half
    store_bytes(codes, byte, 0, 4)


@triton.jit
def value_codes(x, meta, BITS: tl.constexpr, META: tl.constexpr):
    """Codes (tokens, D) int32 of x, whose scale and zero are stored at `meta` (tokens)."""
    x = x.to(tl.float32)
    scale, zero = scale_and_zero(tl.min(x, axis=1), tl.max(x, axis=1), BITS, META)
    tl.store(meta, scale.to(tl.float16))
    if META == 2:
        tl.store(meta + 1, zero.to(tl.float16))
    return quantize(x, scale[:, None], zero[:, None], BITS, META)


@triton.jit
def load_page(new, row, stride, tail, start, first, token, channel, KV_HEADS: tl.constexpr, D: tl.constexpr):
    """Tokens and channels of the page at position `first`: from position `start` on from new, before from the tail."""
    channel = channel[None, :]
    new += ((row + first + token) * stride)[:, None] + channel
    if first >= start:
        x = tl.load(new)
    else:
        fresh = (first + token >= start)[:, None]
        x = tl.load(tail + (token * (KV_HEADS * D))[:, None] + channel, mask=fresh == 0, other=0.0)
        x = tl.load(new, mask=fresh, other=x)
    return x


@triton.jit
def keep_page(new, row, stride, tail, start, end, token, channel, COUNT: tl.constexpr, KV_HEADS: tl.constexpr,
              D: tl.constexpr, PAGE: tl.constexpr, DECODE: tl.constexpr):
    """Copy the new ones among COUNT tokens of the last token's page, from `token` on, to the tail: these channels.

    Nobody reads them there in this launch: pages take new tokens from where they come.
    """
    if DECODE:
        place = start % PAGE
        if (place >= token) & (place < token + COUNT):
            tl.store(tail + place * (KV_HEADS * D) + channel, tl.load(new + (row + start) * stride + channel))
    else:
        first = (end - 1) // PAGE * PAGE
        token += tl.arange(0, COUNT)
        inside = ((first + token >= start) & (first + token < end))[:, None]
        x = tl.load(new + ((row + first + token) * stride)[:, None] + channel[None, :], mask=inside, other=0.0)
        tl.store(tail + (token * (KV_HEADS * D))[:, None] + channel[None, :], x, mask=inside)


@triton.jit
def scale_and_zero(low, high, BITS: tl.constexpr, META: tl.constexpr):
    """Scale and zero of groups, rounded to fp16; META = 1: symmetric, the scale has a sign and zero is 0."""
    if META == 2:
        return to_fp16(divide(high - low, tl.full(low.shape, (1 << BITS) - 1, tl.float32))), to_fp16(low)
    far = tl.where(high >= -low, high, low)
    return to_fp16(far * (-1.0 / (1 << (BITS - 1)))), tl.zeros_like(far)


@triton.jit
def to_fp16(x):
    return tl.minimum(tl.maximum(x, -FP16_MAX), FP16_MAX).to(tl.float16).to(tl.float32)


@triton.jit
def divide(d, s):
    """d / s rounded to nearest, where s broadcasts to d and has at most 11 bits."""
    if FUSED:
        r = 1.0 / s  # approximate
        q = d * r
        return tl.fma(tl.fma(-q, s, d), r, q)
    return tl.div_rn(d, tl.broadcast_to(s, d.shape))


@triton.jit
def quantize(x, scale, zero, BITS: tl.constexpr, META: tl.constexpr):
    """Codes of x fp32, as integers_of has them; scale and zero broadcast to it.

    A scale of zero: code 0, or the middle if symmetric.
    """
    if META == 2:
        return quantize_up_to(x, scale, zero, (1 << BITS) - 1.0)
    middle: tl.constexpr = 1 << (BITS - 1)
    steps = divide(x, tl.where(scale != 0, scale, 1.0)) + 0.5
    return integers_of(tl.minimum(tl.maximum(steps, -1.0 * middle), middle - 0.5), middle)


@triton.jit
def quantize_up_to(x, scale, zero, top):
    """Asymmetric codes 0 .. top, as integers_of has them."""
    steps = divide(x - zero, tl.where(scale > 0, scale, 1.0)) + 0.5
    return integers_of(tl.minimum(tl.maximum(steps, 0.0), tl.where(scale > 0, top, 0.0)), 0)


@triton.jit
def integers_of(x, plus: tl.constexpr):
    """floor(x) + plus in the low 16 bits of int32, for -plus <= x < 2^16; what is above them is left undefined.

    2^23 + x rounded towards zero has the integer in its last bits: one addition, where a conversion takes eight times
    as long.
    """
    if FUSED:
        return tl.inline_asm_elementwise("add.rz.f32 $0, $1, $2;", "=r,f,f", [x, tl.full(x.shape, 8388608.0 + plus,
                                         tl.float32)], dtype=tl.int32, is_pure=True, pack=1)
    return tl.floor(x).to(tl.int32) + plus


@triton.jit
def store_bytes(codes, byte, lane, T: tl.constexpr):
    """byte (tile, u // per, m, g, T lanes from `lane` on, e, half): a lane's words are numbered over (u // per, m).

    Four words of a lane are together, and 32 lanes of them.
    """
    TILES: tl.constexpr = byte.shape[0]
    ROWS: tl.constexpr = byte.shape[1] * byte.shape[2] // 4
    byte = tl.reshape(byte, [TILES, ROWS, 4, 8 * T, 4])  # tile, word // 4, word mod 4, lane, byte of the word
    byte = tl.reshape(tl.permute(byte, (0, 1, 3, 2, 4)), [TILES * ROWS * 8 * T, 16])
    i = tl.arange(0, TILES * ROWS * 8 * T)
    at = i // (8 * T) * 512 + (i // T % 8 * 4 + lane + i % T) * 16
    tl.store(codes + at[:, None] + tl.arange(0, 16)[None, :], byte.to(tl.uint8))


EXTEND_WARPS, STEP_WARPS = 2, 4  # of a program, chosen on an H100


def store_decode(key: torch.Tensor, value: torch.Tensor, keys: PackedPages, values: PackedPages,
                 tail_key: torch.Tensor, tail_value: torch.Tensor, req_to_token: torch.Tensor, slots: torch.Tensor,
                 seq_lens: torch.Tensor, q: torch.Tensor | None = None) -> None:
    """Store the one new token of each request, key and value (batch, kv_heads, D); seq_lens count it.

    q: (batch, q_heads, D), needed if keys are boosted.
    """
    _launch(STEP_WARPS, len(slots), key, value, keys, values, tail_key, tail_value, req_to_token, slots, seq_lens, q=q)


def store_extend(key: torch.Tensor, value: torch.Tensor, keys: PackedPages, values: PackedPages,
                 tail_key: torch.Tensor, tail_value: torch.Tensor, req_to_token: torch.Tensor, slots: torch.Tensor,
                 seq_lens: torch.Tensor, new_lens: torch.Tensor, rows: torch.Tensor, items: torch.Tensor,
                 q: torch.Tensor | None = None) -> None:
    """Store what new_lens[b] tokens, rows[b] .. of key and value, complete, and keep the rest, as `items` say.

    items: one of the two tables of extend_items.  q: (tokens, q_heads, D), rows as those of key; needed if keys are
    boosted.
    """
    if len(items):
        _launch(EXTEND_WARPS, len(items), key, value, keys, values, tail_key, tail_value, req_to_token, slots, seq_lens,
                new_lens, rows, items, q)


def extend_items(seq_lens: Sequence[int], new_lens: Sequence[int], page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What to store before attention and what after it, (items, 2) int32 each: request, and which of its pages.

    The page is counted from the request's first; -1 stands for keeping the page in progress.
    """
    before: list[tuple[int, int]] = []
    after: list[tuple[int, int]] = []
    for b, (end, new) in enumerate(zip(seq_lens, new_lens, strict=True)):
        start = end - new
        completed = end // page - start // page
        before += [(b, i) for i in range(completed)]
        (after if completed and start % page else before).append((b, -1))
    first, second = (torch.tensor(items, dtype=torch.int32).view(-1, 2) for items in (before, after))
    return first, second


def _parts(head_dim: int, page: int) -> int:
    return head_dim // CHANNELS.value + page // TOKENS.value


def _launch(warps: int, count: int, key: torch.Tensor, value: torch.Tensor, keys: PackedPages,
            values: PackedPages, tail_key: torch.Tensor, tail_value: torch.Tensor, req_to_token: torch.Tensor,
            slots: torch.Tensor, seq_lens: torch.Tensor, new_lens: torch.Tensor | None = None,
            rows: torch.Tensor | None = None, items: torch.Tensor | None = None, q: torch.Tensor | None = None) -> None:
    _, page, kv_heads, head_dim = tail_key.shape
    group, q_stride = 0, 0
    if keys.extra is not None:
        if q is None:
            raise ValueError("boosted keys need the queries of the new tokens")
        group, q_stride = q.shape[1] // kv_heads, q.stride(0)
    page_kernel[(count, kv_heads, _parts(head_dim, page))](
        key, value, keys.codes, keys.meta, values.codes, values.meta, tail_key, tail_value, req_to_token, slots,
        seq_lens, new_lens, rows, items, key.stride(0), value.stride(0), req_to_token.stride(0),
        q if group else None, keys.extra, q_stride, KV_HEADS=kv_heads, D=head_dim, PAGE=page, KEY_BITS=keys.bits,
        KEY_META=keys.meta.shape[2], VALUE_BITS=values.bits, VALUE_META=values.meta.shape[4], DECODE=items is None,
        GROUP=group, num_warps=warps)
