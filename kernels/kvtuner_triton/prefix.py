"""Prefill attention over what is stored, unpacked by unpack.py, and the new tokens, one launch a layer.

    out = softmax(sm_scale q K') V', online softmax in base 2, sm_scale > 0.  A query at position t reads as K', V'

    per channel (PAGE > 0)  positions before t // PAGE * PAGE from scratch, from there to t in full precision: what is
                            new in this pass from k, v, what is older from the tail, which is as it was before the pass
    per token (PAGE = 0)    positions 0 .. t from scratch, its own too

A program takes TOKENS positions of a request, from a multiple of TOKENS on, and PACK heads of a group that shares a kv
head: row r of its tile is position first + r // PACK, head r % PACK.  Where TOKENS <= PAGE a tile has one page in full
precision; else its pages are read both ways, and each row masks what is not its own.

    q, out (tokens, q_heads, D), k, v (tokens, kv_heads, D), rows strided     all of the model's dtype: bf16, fp16, fp32
    tail_key, tail_value (slots, PAGE, kv_heads, D)              scratch_key, scratch_value (rows, kv_heads, D)
    requests (n, 5) int32: slot, first new position, end, row of its first new token, scratch row of its position 0
    tiles (n, 2) int32: request, first position, most work first

Nothing outside of these is multiplied: what is not loaded is 0 and scores -inf.  P is rounded to the model's dtype,
sums are fp32; fp32 is multiplied as IEEE says.  Tolerance: error at most 2x that of PyTorch in the model's dtype.

Bytes a program and stored token: 4 D (bf16), mostly from L2; 4 D TOKENS PACK floating point operations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from kvtuner_triton.unpack import INTERPRETED, rounded

LOG2_E = 1.4426950408889634
LOWEST = tl.constexpr(-3.0e38)  # finite, so that a row that has seen nothing yet stays a number


@dataclass(frozen=True)
class PrefixTuning:
    """tokens: positions a tile; heads: heads a tile; columns: keys a step, which divide a page."""

    tokens: int = 128
    heads: int = 1
    columns: int = 64
    warps: int = 8
    stages: int = 2


def prefix_tuning(group: int, page: int | None, dtype: torch.dtype) -> PrefixTuning:
    """Tiles of 128 rows; two heads of 64 positions where that wastes no row, since no page is then computed twice."""
    if dtype == torch.float32:
        return PrefixTuning(tokens=32, columns=32, stages=1)
    return PrefixTuning(tokens=64, heads=2) if page == 64 and group % 2 == 0 else PrefixTuning()


@triton.jit
def prefix_kernel(q, k, v, tail_key, tail_value, scratch_key, scratch_value, out, requests, tiles, q_stride, k_stride,
                  v_stride, out_stride, log2_scale, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
                  PAGE: tl.constexpr, TOKENS: tl.constexpr, PACK: tl.constexpr, N: tl.constexpr):
    """Program (h, i) does tile i for heads PACK h .. of the groups, each padded to whole PACKs."""
    PACKS: tl.constexpr = (GROUP + PACK - 1) // PACK
    WIDTH: tl.constexpr = KV_HEADS * D
    kv_head = tl.program_id(0) // PACKS
    tile = tiles + 2 * tl.program_id(1)
    request = requests + 5 * tl.load(tile)
    first = tl.load(tile + 1)
    start = tl.load(request + 1)
    stop = tl.minimum(first + TOKENS, tl.load(request + 2))
    shift = tl.load(request + 3) - start  # from a position to its row
    scratch = (tl.load(request + 4).to(tl.int64) * KV_HEADS + kv_head) * D

    r = tl.arange(0, TOKENS * PACK)
    row, head = first + r // PACK, tl.program_id(0) % PACKS * PACK + r % PACK
    channel = tl.arange(0, D)[None, :]
    inside = ((row >= start) & (row < stop) & (head < GROUP))[:, None]
    head += kv_head * GROUP
    q_at = (shift + row).to(tl.int64) * q_stride + head * D
    query = tl.load(q + q_at[:, None] + channel, mask=inside, other=0.0)

    low = tl.maximum(first, start)
    # What every row reads from scratch, in whole steps, and what the last one does.
    whole = low // PAGE * PAGE if PAGE > 0 else (low + 1) // N * N
    stored = (stop - 1) // PAGE * PAGE if PAGE > 0 else stop
    n = tl.arange(0, N)
    at = n[:, None] * WIDTH + channel
    top = tl.full([TOKENS * PACK], LOWEST, tl.float32)
    total = tl.zeros([TOKENS * PACK], tl.float32)
    o = tl.zeros([TOKENS * PACK, D], tl.float32)
    for _ in range(0, whole, N):
        key, value = tl.load(scratch_key + scratch + at), tl.load(scratch_value + scratch + at)
        top, total, o = attend(multiply(query, tl.trans(key)), value, log2_scale, top, total, o)
        scratch += N * WIDTH
    if PAGE == 0 or TOKENS > PAGE:
        for column in range(whole, stored, N):
            known = (column + n < stored)[:, None]
            key = tl.load(scratch_key + scratch + at, mask=known, other=0.0)
            value = tl.load(scratch_value + scratch + at, mask=known, other=0.0)
            end = row // PAGE * PAGE if PAGE > 0 else row + 1  # of what the row reads from scratch
            score = tl.where((column + n)[None, :] < end[:, None], multiply(query, tl.trans(key)), float("-inf"))
            top, total, o = attend(score, value, log2_scale, top, total, o)
            scratch += N * WIDTH
    if PAGE > 0:
        tail = (tl.load(request).to(tl.int64) * PAGE * KV_HEADS + kv_head) * D
        for column in range(whole, stop, N):
            position = column + n
            key = load_own(k + kv_head * D, tail_key + tail, position, shift, k_stride, start, stop, PAGE, WIDTH, D)
            value = load_own(v + kv_head * D, tail_value + tail, position, shift, v_stride, start, stop, PAGE, WIDTH, D)
            visible = position[None, :] <= row[:, None]
            if TOKENS > PAGE:
                visible = visible & (position[None, :] >= (row // PAGE * PAGE)[:, None])
            score = tl.where(visible, multiply(query, tl.trans(key)), float("-inf"))
            top, total, o = attend(score, value, log2_scale, top, total, o)
    out_at = (shift + row).to(tl.int64) * out_stride + head * D
    tl.store(out + out_at[:, None] + channel, rounded(o / total[:, None], out.dtype.element_ty), mask=inside)


@triton.jit
def load_own(new, tail, position, shift, stride, start, stop, PAGE: tl.constexpr, WIDTH: tl.constexpr,
             D: tl.constexpr):
    """In full precision (N, D): from `start` on new, before from the tail; 0 from `stop` on."""
    old = tail + position % PAGE * WIDTH
    at = tl.where(position < start, old, new + (shift + position).to(tl.int64) * stride)
    at = tl.multiple_of(at, 16)  # bytes: the compiler cannot tell once two pointers are mixed
    return tl.load(at[:, None] + tl.arange(0, D)[None, :], mask=(position < stop)[:, None], other=0.0)


@triton.jit
def attend(score, value, log2_scale, top, total, o):
    """A step of the online softmax: score (rows, N) fp32, value (N, D); top is scaled and base 2."""
    new_top = tl.maximum(top, tl.max(score, axis=1) * log2_scale)
    alpha = tl.exp2(top - new_top)
    p = tl.exp2(score * log2_scale - new_top[:, None])
    o = multiply_add(rounded(p, value.dtype), value, o * alpha[:, None])
    return new_top, total * alpha + tl.sum(p, axis=1), o


@triton.jit
def multiply(a, b):
    """a . b in fp32; the interpreter takes bf16 for integers."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def multiply_add(a, b, c):
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    return tl.dot(a, b, c, input_precision="ieee")


def prefix_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tail_key: torch.Tensor | None,
                     tail_value: torch.Tensor | None, scratch_key: torch.Tensor, scratch_value: torch.Tensor,
                     requests: torch.Tensor, tiles: torch.Tensor, sm_scale: float, out: torch.Tensor,
                     tuning: PrefixTuning) -> torch.Tensor:
    """out (tokens, q_heads, head_dim) = attention of q, same shape, by the visibility rule.

    k, v (tokens, kv_heads, head_dim); tails (slots, page, kv_heads, head_dim), None: per-token formats; scratch as
    unpacked; requests, tiles: from prefix_tables with the same tuning.tokens, on the device.  The heads of a token are
    contiguous, and every row begins at a multiple of 16 bytes.
    """
    kv_heads, head_dim = k.shape[1:]
    group = q.shape[1] // kv_heads
    page = 0 if tail_key is None else tail_key.shape[1]
    if len(tiles):
        prefix_kernel[(kv_heads * triton.cdiv(group, tuning.heads), len(tiles))](
            q, k, v, tail_key, tail_value, scratch_key, scratch_value, out, requests, tiles, q.stride(0), k.stride(0),
            v.stride(0), out.stride(0), sm_scale * LOG2_E, KV_HEADS=kv_heads, GROUP=group, D=head_dim, PAGE=page,
            TOKENS=tuning.tokens, PACK=tuning.heads, N=tuning.columns, num_warps=tuning.warps,
            num_stages=tuning.stages)
    return out


def prefix_tables(slots: Sequence[int], starts: Sequence[int], ends: Sequence[int], stored: Sequence[int],
                  tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """requests and tiles of a pass over positions starts[b] .. ends[b] - 1 of slots[b], on the CPU.

    stored: scratch rows of each request, from unpack.stored_tokens; tokens: positions a tile.
    """
    start, end, count = (np.asarray(x, dtype=np.int64) for x in (starts, ends, stored))
    new = end - start
    requests = np.stack([np.asarray(slots), start, end, np.cumsum(new) - new, np.cumsum(count) - count], 1)
    begin = start // tokens
    tiles = np.where(new > 0, -(-end // tokens) - begin, 0)
    b = np.repeat(np.arange(len(new)), tiles)
    first = (begin[b] + np.arange(len(b)) - (np.cumsum(tiles) - tiles)[b]) * tokens
    order = np.argsort(-np.minimum(first + tokens, end[b]), kind="stable")
    return (torch.from_numpy(requests.astype(np.int32)),
            torch.from_numpy(np.stack([b, first], 1)[order].astype(np.int32)))
