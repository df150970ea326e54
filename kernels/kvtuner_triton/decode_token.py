"""Decode attention over keys and values stored per token, in plain Triton.

    x' = code * scale + zero, or (code - 2^(bits - 1)) * scale if symmetric; then attention as ever, online softmax

A query reads every token as stored, its own too, so there is no page in progress; the plan (decode_plan.py) deals out
blocks of BLOCK tokens instead of pages, and its first `batch` rows are the last, incomplete blocks.  Pages may have any
size: a token is found by its own place in req_to_token.  Merged by decode_merge.py.

Memory: q (batch, q_heads, D); codes (pages, kv_heads, page, D * bits / 8) uint8 in plain order (layout.py);
meta (pages, kv_heads, page, groups, 1 or 2) fp16; table = req_to_token (slots, table_stride) int32;
partial (rows, q_heads, D) fp32, lse (rows, q_heads) fp32, base 2.

Bytes a token and kv head at D = 128, one group: kv8 264, kv4 136, kv2 72.  Tolerance: error at most 2x that of bf16
PyTorch against float64 on the dequantized cache; q, x' and scale p are rounded to fp16, all sums are fp32.  If q is
fp32 nothing is rounded to less: at most 2x the error of fp32 PyTorch and 2^-23 of the largest score.
"""

import torch
import triton
import triton.language as tl

from kvtuner_triton.decode import DecodeWorkspace, PackedPages, Tuning
from kvtuner_triton.decode_merge import merge
from kvtuner_triton.decode_portable import LOG2_E, load_query, store_partial

BLOCK = 64  # tokens a step, and the unit of the plan: DecodeWorkspace(page=BLOCK)


def token_tuning() -> Tuning:
    """Programs have four warps here, so fewer of them fill a multiprocessor."""
    return Tuning(programs_per_sm=4)


@triton.jit(do_not_specialize=["batch", "table_stride"])
def token_kernel(q_ptr, key_codes, key_meta, value_codes, value_meta, table, plan, partial, lse, sm_scale, batch,
                 table_stride, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
                 KEY_BITS: tl.constexpr, KEY_GROUPS: tl.constexpr, KEY_META: tl.constexpr, VALUE_BITS: tl.constexpr,
                 VALUE_GROUPS: tl.constexpr, VALUE_META: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr):
    """Program (head, row) does row `row` of the plan for kv head `head`; HEADS is GROUP padded to what a dot takes."""
    # Codes and zeros summed apart cancel, which costs a digit: fp32 is asked for where digits count.
    FOLD: tl.constexpr = q_ptr.dtype.element_ty != tl.float32
    head = tl.program_id(0)
    row = tl.program_id(1)
    request = tl.load(plan + row * 4)
    slot = tl.load(plan + row * 4 + 1).to(tl.int64)
    start = tl.load(plan + row * 4 + 2) * T
    last = tl.load(plan + row * 4 + 3)
    end = tl.where(row < batch, start + last, last * T)
    if request >= 0:
        q = load_query(q_ptr + (request * KV_HEADS + head).to(tl.int64) * (GROUP * D), GROUP, D, HEADS)
        top = tl.full([HEADS], float("-inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        o = tl.zeros([HEADS, D], tl.float32)
        q_sum = tl.sum(q.to(tl.float32), axis=1)
        for block in range(start, end, T):
            token = block + tl.arange(0, T)
            inside = token < end
            place = tl.load(table + slot * table_stride + token, mask=inside, other=0).to(tl.int64)
            at = (place // PAGE * KV_HEADS + head) * PAGE + place % PAGE
            k = load_codes(key_codes, at, inside, D, KEY_BITS).to(q.dtype)
            v = load_codes(value_codes, at, inside, D, VALUE_BITS).to(q.dtype)
            if KEY_GROUPS == 1 and FOLD:  # the score takes a token's scale and zero: no element is multiplied
                scale, zero = load_meta(key_meta + at * KEY_META, inside, KEY_BITS, KEY_META)
                score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale[None, :]
                score += q_sum[:, None] * zero[None, :]
            else:
                k = multiply_out(k, key_meta, at, inside, D, KEY_BITS, KEY_GROUPS, KEY_META)
                score = tl.dot(q, tl.trans(k), input_precision="ieee")
            score = tl.where(inside[None, :], score * (sm_scale * LOG2_E), float("-inf"))
            new_top = tl.maximum(top, tl.max(score, axis=1))
            alpha = tl.exp2(top - new_top)
            p = tl.exp2(score - new_top[:, None])
            o *= alpha[:, None]
            if VALUE_GROUPS == 1 and FOLD:
                scale, zero = load_meta(value_meta + at * VALUE_META, inside, VALUE_BITS, VALUE_META)
                weight = (p * scale[None, :]).to(v.dtype)
                o = tl.dot(weight, v, o, input_precision="ieee") + tl.sum(p * zero[None, :], axis=1)[:, None]
            else:
                v = multiply_out(v, value_meta, at, inside, D, VALUE_BITS, VALUE_GROUPS, VALUE_META)
                o = tl.dot(p.to(v.dtype), v, o, input_precision="ieee")
            total = total * alpha + tl.sum(p, axis=1)
            top = new_top
        store_partial(partial, lse, row, head, top, total, o, KV_HEADS, GROUP, D, HEADS)


@triton.jit
def load_codes(codes, at, inside, D: tl.constexpr, BITS: tl.constexpr):
    """Rows `at` of (rows, D * BITS / 8) bytes -> codes (T, D) fp16; zero if not `inside`."""
    WIDTH: tl.constexpr = D * BITS // 8
    x = tl.load(codes + at[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], mask=inside[:, None], other=0)
    if BITS == 4:
        x = tl.join(x & 15, x >> 4)
    elif BITS == 2:
        x = tl.join(tl.join(x & 3, x >> 4 & 3), tl.join(x >> 2 & 3, x >> 6))
    x = tl.reshape(x, [x.shape[0], D])
    # 1024 + code by its bits: GPUs turn integers into floats at a quarter of the rate of everything else.
    return (x.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1024.0


@triton.jit
def load_meta(meta, inside, BITS: tl.constexpr, META: tl.constexpr):
    """Scale and zero at `meta` as fp32, zero if not `inside`; META = 1: symmetric, code 2^(BITS - 1) is zero."""
    scale = tl.load(meta, mask=inside, other=0.0).to(tl.float32)
    if META == 2:
        return scale, tl.load(meta + 1, mask=inside, other=0.0).to(tl.float32)
    return scale, scale * -(1 << (BITS - 1))


@triton.jit
def multiply_out(code, meta, at, inside, D: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr,
                 META: tl.constexpr):
    """Codes (T, D) -> x' of their dtype, with GROUPS scales a token."""
    group = (at * GROUPS)[:, None] + (tl.arange(0, D) // (D // GROUPS))[None, :]
    scale, zero = load_meta(meta + group * META, inside[:, None], BITS, META)
    return (code.to(tl.float32) * scale + zero).to(code.dtype)


def decode_token_attention(workspace: DecodeWorkspace, q: torch.Tensor, keys: PackedPages, values: PackedPages,
                           req_to_token: torch.Tensor, sm_scale: float, out: torch.Tensor) -> torch.Tensor:
    """out (batch, q_heads, head_dim) = attention of q, same shape; `workspace`, with page=BLOCK, is planned."""
    attend_tokens(workspace, q, keys, values, req_to_token, sm_scale)
    merge(workspace.partial, workspace.lse, workspace.spans, out)
    return out


def attend_tokens(workspace: DecodeWorkspace, q: torch.Tensor, keys: PackedPages, values: PackedPages,
                  req_to_token: torch.Tensor, sm_scale: float, warps: int = 4) -> None:
    """The partial results of every row of the plan, into workspace.partial and workspace.lse."""
    w = workspace
    group = w.q_heads // w.kv_heads
    token_kernel[(w.kv_heads, w.plan_table.shape[0])](
        q, keys.codes, keys.meta, values.codes, values.meta, req_to_token, w.plan_table, w.partial, w.lse, sm_scale,
        w.batch, req_to_token.stride(0), KV_HEADS=w.kv_heads, GROUP=group, D=w.head_dim, PAGE=keys.codes.shape[2],
        KEY_BITS=keys.bits, KEY_GROUPS=keys.meta.shape[3], KEY_META=keys.meta.shape[4], VALUE_BITS=values.bits,
        VALUE_GROUPS=values.meta.shape[3], VALUE_META=values.meta.shape[4], T=w.page,
        HEADS=max(16, triton.next_power_of_2(group)), num_warps=warps)
