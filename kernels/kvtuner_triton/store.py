"""Store new keys and values: quantize and pack complete pages, keep the page in progress.

One launch a layer, before attention, which reads the new pages as stored (unpack.py).  An extend's queries also read
what their first page had before (prefix.py): a request that begins inside a page and completes it keeps its new page in
progress in a second launch, after attention.

Bit for bit what reference.py and fragments.py give on a CPU, but for the sign of a zero that is 0 in a group with both
+0 and -0, of which torch promises neither.  With low, high over a group (keys: a channel of the page;
values: a token), all in fp32:

    zero = fp16(low), scale = fp16((high - low) / top),  code = clamp(floor((x - zero) / scale + 1/2), 0, top)

and the symmetric form of reference.py, whose scale, far / -2^(b-1), is exact until rounded to fp16.  Of boosted keys
top is 255 in the channel of each slot with the largest w (high - low)^2, and 15 in the others; w is the sum of q^2 over
the kv head's query heads at the page's last position, which is new whenever a page is completed.

How: rounding.py, store_keys.py, store_values.py.

Request b has new tokens at positions seq_lens[b] - new .. seq_lens[b] - 1, in rows of key and value that follow those
of the request before.  Each page they complete is one item, quantized from the rows and, for the first, from the slot's
tail; the page of the last token is another, kept in the tail, complete or not, since that token's own query reads it
there.  Decoding: one new token, and one item a request that does both, so the grid depends on the batch alone; padded
requests have slot 0 and length 1 and write to tail 0.  No item reads from a tail what another one writes: new tokens of
a page come from the rows.

    key, value (tokens, kv_heads, D), q (tokens, q_heads, D), rows strided, 16 bit or fp32; q only for boosted keys
    codes, meta, extra as layout.py has them, codes in fragment order, extra in that of slots
    tail_key, tail_value (slots, PAGE, kv_heads, D)       table = req_to_token (slots, table_stride) int32

A program does 64 channels of a page's keys or as many numbers of its values, two channels at a time (pairs.py).  On an
H100 64 numbers a lane beat 128, though scales are then worked out by more lanes: a warp that is done sooner counts for
more than fewer instructions in all.  They also beat programs that load their next page while they do one.

Bytes a token and kv head at D = 128, PAGE = 64: 512 read; kv8 268, kv4 140 (boosted, symmetric values 142), kv2 76
written.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from kvtuner_triton.decode import PackedPages
from kvtuner_triton.pairs import words_at
from kvtuner_triton.store_keys import CHANNELS, key_tokens, key_words, store_keys
from kvtuner_triton.store_values import store_values, value_tokens, value_words


@triton.jit(do_not_specialize=["table_stride"])
def extend_kernel(key, value, key_codes, key_meta, value_codes, value_meta, tail_key, tail_value, table, slots, items,
                  key_stride, value_stride, table_stride, q, key_extra, q_stride, KV_HEADS: tl.constexpr,
                  D: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr, KEY_BITS: tl.constexpr,
                  KEY_META: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_META: tl.constexpr, GROUP: tl.constexpr,
                  SM90: tl.constexpr):
    """Program (head, part), i, what does a part of item i's keys, what = 0, or values, of kv head `head`.

    Each has D / 64 parts, of 64 channels or of TOKENS.  Keys, which take longer, come first; neighbouring programs read
    neighbouring bytes of the same tokens.

    GROUP: query heads a kv head, 0 if keys are not boosted; q and key_extra are None then.
    """
    part = tl.program_id(0) % (D // CHANNELS)
    if tl.program_id(2) == 0:
        extend_part(key, key_stride, key_tokens(PAGE), key_words(part), part, key_codes, key_meta, key_extra, tail_key,
                    table, slots, items, table_stride, q, q_stride, KV_HEADS, D, PAGE, KEY_BITS, KEY_META, GROUP, SM90,
                    True)
    else:
        start = part * TOKENS
        extend_part(value, value_stride, value_tokens(start, TOKENS), value_words(D), start, value_codes, value_meta,
                    None, tail_value, table, slots, items, table_stride, q, q_stride, KV_HEADS, D, PAGE, VALUE_BITS,
                    VALUE_META, 0, SM90, False)


@triton.jit
def extend_part(new, stride, token, word, part, codes, meta, extra, tail, table, slots, items, table_stride, q,
                q_stride, KV_HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr,
                META: tl.constexpr, GROUP: tl.constexpr, SM90: tl.constexpr, KEYS: tl.constexpr):
    """Load words of these tokens, and store or keep them; part: of keys, or the first token of values."""
    head = tl.program_id(0) // (D // CHANNELS)
    dtype: tl.constexpr = new.dtype.element_ty
    new, stride = words_at(new + head * D), stride // 2
    tail = words_at(tail + head * D) + token * (KV_HEADS * D // 2) + word
    items += 5 * tl.program_id(1)
    first, row = tl.load(items + 1), tl.load(items + 2).to(tl.int64)
    fresh, stop = tl.load(items + 3), tl.load(items + 4)
    slot = tl.load(slots + tl.load(items)).to(tl.int64)
    new += row * stride + (token * stride + word)
    TAIL: tl.constexpr = PAGE * KV_HEADS * D // 2  # words of a slot; which one is known later than where `new` is
    if stop > 0:
        w = tl.load(tl.where(token < fresh, tail + slot * TAIL, new)) if fresh > 0 else tl.load(new)
        at = tl.load(table + slot * table_stride + first).to(tl.int64) // PAGE * KV_HEADS + head
        query = q if GROUP == 0 else q + (row + PAGE - 1) * q_stride + head * (GROUP * D)
        store_part(w, at, part, codes, meta, extra, query, D, PAGE, BITS, META, GROUP, dtype, SM90, KEYS)
    else:
        kept = (token >= fresh) & (token < -stop)
        tl.store(tail + slot * TAIL, tl.load(new, mask=kept, other=0), mask=kept)


@triton.jit
def store_part(w, at, part, codes, meta, extra, query, D: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr,
               META: tl.constexpr, GROUP: tl.constexpr, dtype: tl.constexpr, SM90: tl.constexpr, KEYS: tl.constexpr):
    if KEYS:
        store_keys(w, part, at, codes, meta, extra, query, D, PAGE, BITS, META, GROUP, dtype, SM90)
    else:
        store_values(w, at * PAGE + part, codes, meta, D, BITS, META, dtype, SM90)


@triton.jit(do_not_specialize=["table_stride"])
def step_kernel(key, value, key_codes, key_meta, value_codes, value_meta, tail_key, tail_value, table, slots, seq_lens,
                key_stride, value_stride, table_stride, q, key_extra, q_stride, KV_HEADS: tl.constexpr, D: tl.constexpr,
                PAGE: tl.constexpr, TOKENS: tl.constexpr, KEY_BITS: tl.constexpr, KEY_META: tl.constexpr,
                VALUE_BITS: tl.constexpr, VALUE_META: tl.constexpr, GROUP: tl.constexpr, SM90: tl.constexpr):
    """Program (head, part), b, what does a part, as in extend_kernel, of request b, whose new token is in row b."""
    part = tl.program_id(0) % (D // CHANNELS)
    if tl.program_id(2) == 0:
        step_part(key, key_stride, key_tokens(PAGE), key_words(part), part, 0, PAGE, key_codes, key_meta, key_extra,
                  tail_key, table, slots, seq_lens, table_stride, q, q_stride, KV_HEADS, D, PAGE, KEY_BITS, KEY_META,
                  GROUP, SM90, True)
    else:
        start = part * TOKENS
        step_part(value, value_stride, value_tokens(start, TOKENS), value_words(D), start, start, start + TOKENS,
                  value_codes, value_meta, None, tail_value, table, slots, seq_lens, table_stride, q, q_stride,
                  KV_HEADS, D, PAGE, VALUE_BITS, VALUE_META, 0, SM90, False)


@triton.jit
def step_part(new, stride, token, word, part, start, stop, codes, meta, extra, tail, table, slots, seq_lens,
              table_stride, q, q_stride, KV_HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
              BITS: tl.constexpr, META: tl.constexpr, GROUP: tl.constexpr, SM90: tl.constexpr, KEYS: tl.constexpr):
    """As extend_part; tokens start .. stop - 1 are those of the tensor of words."""
    b, head = tl.program_id(1).to(tl.int64), tl.program_id(0) // (D // CHANNELS)
    dtype: tl.constexpr = new.dtype.element_ty
    end = tl.load(seq_lens + b).to(tl.int32)
    slot = tl.load(slots + b).to(tl.int64)
    new = words_at(new + b * stride + head * D) + word
    tail = words_at(tail + (slot * PAGE * KV_HEADS + head) * D) + word
    if end % PAGE == 0:
        page = tl.load(table + slot * table_stride + end - PAGE).to(tl.int64) // PAGE
        w = tl.load(tl.where(token < PAGE - 1, tail + token * (KV_HEADS * D // 2), new))
        query = q if GROUP == 0 else q + b * q_stride + head * (GROUP * D)
        store_part(w, page * KV_HEADS + head, part, codes, meta, extra, query, D, PAGE, BITS, META, GROUP, dtype, SM90,
                   KEYS)
    last = (end - 1) % PAGE
    if (last >= start) & (last < stop):
        tl.store(tail + last * (KV_HEADS * D // 2), tl.load(new))


EXTEND_WARPS, STEP_WARPS = 2, 4  # of a program, for pages of 64, chosen on an H100: a step mostly waits for one page
REGISTERS = 88  # of a lane at 16 bits, which suffice; the compiler takes up to 128, and then fewer programs run at once


def store_decode(key: torch.Tensor, value: torch.Tensor, keys: PackedPages, values: PackedPages,
                 tail_key: torch.Tensor, tail_value: torch.Tensor, req_to_token: torch.Tensor, slots: torch.Tensor,
                 seq_lens: torch.Tensor, q: torch.Tensor | None = None) -> None:
    """Store the one new token of each request, key and value (batch, kv_heads, D); seq_lens count it.

    q: (batch, q_heads, D), needed if keys are boosted.
    """
    grid, constants = _launch(STEP_WARPS, len(slots), keys, values, tail_key, q)
    step_kernel[grid](key, value, keys.codes, keys.meta, values.codes, values.meta, tail_key, tail_value, req_to_token,
                      slots, seq_lens, key.stride(0), value.stride(0), req_to_token.stride(0), **constants)


def store_extend(key: torch.Tensor, value: torch.Tensor, keys: PackedPages, values: PackedPages,
                 tail_key: torch.Tensor, tail_value: torch.Tensor, req_to_token: torch.Tensor, slots: torch.Tensor,
                 items: torch.Tensor, q: torch.Tensor | None = None) -> None:
    """Store the pages that new tokens, the rows of key and value, complete, and keep the rest, as `items` say.

    items: one of the two tables of extend_items.  q: (tokens, q_heads, D), rows as those of key; needed if keys are
    boosted.
    """
    if len(items):
        grid, constants = _launch(EXTEND_WARPS, len(items), keys, values, tail_key, q)
        extend_kernel[grid](key, value, keys.codes, keys.meta, values.codes, values.meta, tail_key, tail_value,
                            req_to_token, slots, items, key.stride(0), value.stride(0), req_to_token.stride(0),
                            **constants)


def extend_items(seq_lens: Sequence[int], new_lens: Sequence[int], page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What to store before attention and what after it, (items, 5) int32 each, one page of one request a row.

    Columns: request; position of the page's first token; row of key and value it has, or would have if it were new;
    which of the page's tokens are new, from .. to; `to` is negative if the page is to be kept, not completed.
    """
    before: list[tuple[int, ...]] = []
    after: list[tuple[int, ...]] = []
    row = 0
    for b, (end, new) in enumerate(zip(seq_lens, new_lens, strict=True)):
        start = end - new
        completed = range(start // page * page, end // page * page, page)
        before += [(b, first, row + first - start, max(start - first, 0), page) for first in completed]
        last = (end - 1) // page * page
        kept = (b, last, row + last - start, max(start - last, 0), last - end)
        (after if completed and start % page else before).append(kept)
        row += new
    first, second = (torch.tensor(items, dtype=torch.int32).view(-1, 5) for items in (before, after))
    return first, second


@cache
def has_integers_in_pairs(device: torch.device) -> bool:
    """Whether it is a GPU with min.u16x2, from sm_90."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _launch(warps: int, count: int, keys: PackedPages, values: PackedPages, tail: torch.Tensor,
            q: torch.Tensor | None) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """The grid for `count` items, and the arguments that both kernels have.

    count: at most 65,535, a grid's y; so many pages are 4 million new tokens.
    """
    _, page, kv_heads, head_dim = tail.shape
    group, q_stride = 0, 0
    if keys.extra is not None:
        if q is None:
            raise ValueError("boosted keys need the queries of the new tokens")
        group, q_stride = q.shape[1] // kv_heads, q.stride(0)
    tokens = page * CHANNELS.value // head_dim  # of values, a program: as many numbers as of keys
    constants = {"q": q if group else None, "key_extra": keys.extra, "q_stride": q_stride, "KV_HEADS": kv_heads,
                 "D": head_dim, "PAGE": page, "TOKENS": tokens, "KEY_BITS": keys.bits, "KEY_META": keys.meta.shape[2],
                 "VALUE_BITS": values.bits, "VALUE_META": values.meta.shape[4], "GROUP": group,
                 "SM90": has_integers_in_pairs(tail.device), "num_warps": warps * page // 64,
                 "maxnreg": REGISTERS * tail.itemsize // 2}
    return (kv_heads * head_dim // CHANNELS.value, count, 2), constants
