"""Decode attention over packed pages, for NVIDIA GPUs with mma.sync m16n8k16 (Gluon; tuned on Hopper).

One warp takes one (kv head, chunk of pages) and runs on its own.  With q of the GROUP query heads padded to 8, c the
codes, per page and channel s_k, z_k, per token s_v, z_v:

    score[token, h] = sum_d c_k[token, d] (s_k[d] q[h, d]) + sum_d z_k[d] q[h, d]        two MMA, s_k q in fp16
    p[token, h]     = 2^(score * sm_scale * log2 e - top[h])                             online softmax, fp32
    out[h, d]       = (sum_token c_v[token, d] (s_v[token] p) + sum_token z_v p) / sum_token p

Boosted keys: c = 16 first + second where s_k has its sign bit set, so first halves are multiplied by 16 |s_k| q, and
one more MMA per 16 tokens adds

    sum_t,slot second[token, slot] (sum of |s_k[d]| q[h, d] over the boosted d of lane quad t in that slot)

Of a slot's channels a single one is boosted and a single quad has it, so each of the 16 sums is one product, or zero;
a lane finds its own four without asking which channel it is.

No element is multiplied: a code becomes an MMA operand by masking (hopper_operands.py).  Pages travel through a ring
of STAGES steps of T tokens in shared memory, filled by cp.async; a lane reads back what it needs, 16 bytes at a time,
as fragments (fragments.py).  The page in progress is in full precision and takes a program of its own.

Memory (codes, and pairs of fp16, are read as int32 words):
    q (batch, q_heads, D) 16 bit         codes (pages, kv_heads, PAGE, D * bits / 8) in fragment order
    key meta (pages, kv_heads, m, D)     value meta (pages, kv_heads, PAGE, 1, m)
        fp16, scale then zero; m = 1: symmetric, the zero is -2^(bits - 1) scale and takes no bytes
    key extra (pages, kv_heads, PAGE, D / 32) uint8 in the order of slots, or None
    tail_key, tail_value (slots, PAGE, kv_heads, D)         table = req_to_token (slots, table_stride) int32
    plan (rows, 4) int32, see decode_plan.py
    partial (rows, q_heads, D) fp32, lse (rows, q_heads) fp32, base 2

Bytes a token and kv head at D = 128, PAGE = 64: kv8 268, kv4 140 (boosted keys and symmetric values 142), kv2 76.
Tolerance: error at most 2x that of bf16 PyTorch against float64 on the dequantized cache; q, s_k q and s_v p are
rounded to fp16 (p of the page in progress to the model's dtype), all sums are fp32.
|s_k q| may reach 2^18, and s_v 2^12 (at 4 bits, values that span 60,000), before fp16 overflows.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from kvtuner_triton.hopper_operands import (
    CODE_UNIT,
    accumulator,
    channel_operand,
    channel_pair_layout,
    channel_row,
    channel_rows,
    exp2,
    field_factor,
    halves,
    key_operand,
    lane_columns,
    lane_sum_layout,
    lane_sums,
    output_layout,
    plain_key_layout,
    plain_key_operand,
    plain_value_layout,
    plain_value_operand,
    probability_operand,
    query_layout,
    repeat_rows,
    slot_factors,
    slot_operand,
    slot_pair_layout,
    split_scales,
    token_layout,
    token_pair_layout,
    token_rows,
    value_operand,
    warp_sums,
)

QUERY_UNIT = gl.constexpr(0.25)  # q is held as fp16(q / 4): room for large scales
VALUE_UNIT = gl.constexpr(16.0)  # s_v p is held times 16: room for small scales
# Triton 3.9 renamed it.
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit(do_not_specialize=["batch", "table_stride"])
def decode_kernel(q_ptr, key_codes, key_meta, key_extra, value_codes, value_meta, tail_key, tail_value, table, plan,
                  partial, lse, sm_scale, batch, table_stride, KV_HEADS: gl.constexpr, GROUP: gl.constexpr,
                  D: gl.constexpr, PAGE: gl.constexpr, KEY_BITS: gl.constexpr, KEY_META: gl.constexpr,
                  VALUE_BITS: gl.constexpr, VALUE_META: gl.constexpr, BOOSTED: gl.constexpr, T: gl.constexpr,
                  STAGES: gl.constexpr):
    """Program (head, row) does row `row` of the plan for kv head `head`."""
    head = gl.program_id(0)
    row = gl.program_id(1)
    request = gl.load(plan + row * 4)
    slot = gl.load(plan + row * 4 + 1)
    first = gl.load(plan + row * 4 + 2)
    last = gl.load(plan + row * 4 + 3)
    if request >= 0:
        q = load_query(q_ptr + (request * KV_HEADS + head).to(gl.int64) * (GROUP * D), GROUP, D)
        log2_scale = sm_scale * LOG2_E
        if row < batch:
            offset = (slot.to(gl.int64) * PAGE * KV_HEADS + head) * D
            top, total, o = attend_tail(q, tail_key + offset, tail_value + offset, last, log2_scale, KV_HEADS, D)
        else:
            pages = (key_codes, key_meta, value_codes, value_meta, key_extra)
            q_unit = (q.to(gl.float32) * QUERY_UNIT).to(gl.float16)
            top, total, o = attend_pages(q_unit, pages, table + slot.to(gl.int64) * table_stride, head, first, last,
                                         log2_scale / QUERY_UNIT, KV_HEADS, D, PAGE, KEY_BITS, KEY_META, VALUE_BITS,
                                         VALUE_META, BOOSTED, T, STAGES)
        out = (row * KV_HEADS + head).to(gl.int64) * GROUP
        store_partial(partial + out * D, lse + out, top, total, o, GROUP, D)


@gluon.jit
def load_query(q_ptr, GROUP: gl.constexpr, D: gl.constexpr):
    """(GROUP, D) -> (8, D), rows past GROUP zero."""
    head = gl.arange(0, 8, layout=gl.SliceLayout(1, query_layout(D)))
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, query_layout(D)))
    inside = (head < GROUP)[:, None] & (channel < D)[None, :]
    return gl.load(q_ptr + head[:, None] * D + channel[None, :], mask=inside, other=0.0)


@gluon.jit
def attend_pages(q, pages, table, head, first, last, log2_scale, KV_HEADS: gl.constexpr, D: gl.constexpr,
                 PAGE: gl.constexpr, KEY_BITS: gl.constexpr, KEY_META: gl.constexpr, VALUE_BITS: gl.constexpr,
                 VALUE_META: gl.constexpr, BOOSTED: gl.constexpr, T: gl.constexpr, STAGES: gl.constexpr):
    """Pages first .. last - 1 of one request, first < last -> top (8 heads), total (lane sums), o (D, 8).

    q: (8, D) fp16, times QUERY_UNIT.
    """
    SUB: gl.constexpr = PAGE // T  # steps a page
    words: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, query_layout(D)))
    q_fields = (q.to(gl.float32) * field_factor(channel // 2, KEY_BITS)[None, :]).to(gl.float16)
    q_operand = channel_operand(q, D)
    value_unit = field_factor(gl.arange(0, T, layout=token_layout(T)), VALUE_BITS) * VALUE_UNIT

    ring = (stages(STAGES, T * D * KEY_BITS // 32), stages(STAGES, D * KEY_META // 2),
            stages(STAGES, T * D * VALUE_BITS // 32), stages(STAGES, T * VALUE_META // 2),
            stages(STAGES, T * D // 128) if BOOSTED else None)
    steps = (last - first) * SUB
    for k in gl.static_range(STAGES - 1):
        page = gl.load(table + (first + gl.minimum(k, steps - 1) // SUB) * PAGE) // PAGE
        fill(ring, k, pages, page.to(gl.int64) * KV_HEADS + head, k % SUB, k < steps, SUB)
    page = gl.load(table + (first + gl.minimum(STAGES - 1, steps - 1) // SUB) * PAGE) // PAGE

    top = gl.full([8], float("-inf"), gl.float32, layout=gl.SliceLayout(0, accumulator()))
    total = gl.zeros([8, 8], gl.float32, layout=lane_sum_layout())
    zeros = gl.zeros([8, 8], gl.float32, layout=lane_sum_layout())
    o = gl.zeros([D, 8], gl.float32, layout=accumulator())
    for step in range(steps):
        async_copy.wait_group(STAGES - 2)
        ahead = step + STAGES - 1
        fill(ring, ahead % STAGES, pages, page.to(gl.int64) * KV_HEADS + head, ahead % SUB, ahead < steps, SUB)
        # The page id is asked for one step before its copies start, so that nothing waits for it.
        page = gl.load(table + (first + gl.minimum(ahead + 1, steps - 1) // SUB) * PAGE) // PAGE

        now = step % STAGES
        scale = halves(ring[1].index(now).slice(0, D // 2).load(channel_pair_layout(D)))
        if KEY_META == 2:
            zero = halves(ring[1].index(now).slice(D // 2, D // 2).load(channel_pair_layout(D)))
        else:
            zero = scale * -(2.0 ** (KEY_BITS - 1))
        scale = gl.convert_layout(scale, gl.SliceLayout(0, query_layout(D)), assert_trivial=True)
        score = gl.zeros([T, 8], gl.float32, layout=accumulator())
        if BOOSTED:
            scale, half_scale = split_scales(scale)
            extra = ring[4].index(now).load(slot_pair_layout(T, D))  # type: ignore[union-attr]
            extra = slot_operand(extra, T, D)
            score = mma_v2(extra, slot_factors(q, half_scale, D), score)
        keys = key_operand(ring[0].index(now).load(words), T, D, KEY_BITS)
        score = mma_v2(keys, channel_operand(q_fields * scale[None, :], D), score)
        offset = mma_v2(channel_row(zero, D), q_operand, gl.zeros([16, 8], gl.float32, layout=accumulator()))
        score = score * (log2_scale * CODE_UNIT) + repeat_rows(offset, T) * log2_scale
        top, total, alpha, p = softmax_step(score, top, total, T)

        if VALUE_META == 2:
            scale, zero = gl.split(halves(ring[3].index(now).load(token_layout(T))).reshape([T, 2]))
            zero = zero.to(gl.float32)
        else:
            scale = halves(ring[3].index(now).load(token_pair_layout(T)))
            zero = scale.to(gl.float32) * -(2.0 ** (VALUE_BITS - 1))
        zeros = zeros * lane_columns(alpha)[None, :] + lane_sums(p * token_rows(zero, T)[:, None], T)
        scale = gl.convert_layout(scale, token_layout(T), assert_trivial=True)
        weight = p * token_rows(scale.to(gl.float32) * value_unit, T)[:, None]
        values = value_operand(ring[2].index(now).load(words), T, D, VALUE_BITS)
        o = mma_v2(values, probability_operand(weight.to(gl.float16), T), o * alpha[None, :])
    async_copy.wait_group(0)
    return top, total, o * (CODE_UNIT / VALUE_UNIT) + warp_sums(zeros)[None, :]


@gluon.jit
def stages(STAGES: gl.constexpr, WORDS: gl.constexpr):
    """A ring of STAGES buffers of WORDS int32."""
    return gl.allocate_shared_memory(gl.int32, [STAGES, WORDS], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def fill(ring, stage, pages, row, sub, inside, SUB: gl.constexpr):
    """Start the copies of one step, part `sub` of SUB of page and head `row`, as one group; zeros if not `inside`."""
    copy_words(ring[0].index(stage), pages[0], row * SUB + sub, inside)
    copy_words(ring[1].index(stage), pages[1], row, inside)
    copy_words(ring[2].index(stage), pages[2], row * SUB + sub, inside)
    copy_words(ring[3].index(stage), pages[3], row * SUB + sub, inside)
    if ring[4] is not None:
        copy_words(ring[4].index(stage), pages[4], row * SUB + sub, inside)
    async_copy.commit_group()


@gluon.jit
def copy_words(buffer, source, row, inside):
    """Copy row `row` of (rows, WORDS) int32 at `source` into a buffer of WORDS."""
    WORDS: gl.constexpr = buffer.shape[0]
    word = gl.arange(0, WORDS, layout=gl.BlockedLayout([max(1, min(4, WORDS // 32))], [32], [1], [0]))
    copy_async(buffer, source + row * WORDS + word, mask=(word < WORDS) & inside)


@gluon.jit
def softmax_step(score, top, total, T: gl.constexpr):
    """One step of the online softmax in base 2; `total` stays per lane, so only the maximum crosses lanes."""
    new_top = gl.maximum(top, gl.max(score, axis=0))
    alpha = exp2(top - new_top)
    p = exp2(score - new_top[None, :])
    return new_top, total * lane_columns(alpha)[None, :] + lane_sums(p, T), alpha, p


@gluon.jit
def attend_tail(q, tail_key, tail_value, tokens, log2_scale, KV_HEADS: gl.constexpr, D: gl.constexpr):
    """The first `tokens` rows of a slot's full-precision page -> top (8 heads), total (lane sums), o (D, 8).

    q: (8, D) of the model's dtype, which K, V and probabilities are multiplied in too.
    """
    key_token = gl.arange(0, 32, layout=gl.SliceLayout(1, plain_key_layout(D)))
    key_channel = gl.arange(0, D, layout=gl.SliceLayout(0, plain_key_layout(D)))
    value_token = gl.arange(0, 32, layout=gl.SliceLayout(1, plain_value_layout(D)))
    value_channel = gl.arange(0, D, layout=gl.SliceLayout(0, plain_value_layout(D)))
    token = gl.arange(0, 32, layout=token_layout(32))
    q_operand = channel_operand(q, D)
    top = gl.full([8], float("-inf"), gl.float32, layout=gl.SliceLayout(0, accumulator()))
    total = gl.zeros([8, 8], gl.float32, layout=lane_sum_layout())
    o = gl.zeros([D, 8], gl.float32, layout=accumulator())
    for start in range(0, tokens, 32):
        # What lies past the tokens may be anything, NaN too: it must not even be multiplied by zero.
        k = gl.load(tail_key + (start + key_token)[:, None] * (KV_HEADS * D) + key_channel[None, :],
                    mask=(start + key_token < tokens)[:, None] & (key_channel < D)[None, :], other=0.0)
        v = gl.load(tail_value + (start + value_token)[:, None] * (KV_HEADS * D) + value_channel[None, :],
                    mask=(start + value_token < tokens)[:, None] & (value_channel < D)[None, :], other=0.0)
        score = mma_v2(plain_key_operand(k, D), q_operand,
                       gl.zeros([32, 8], gl.float32, layout=accumulator()))
        inside = token_rows((start + token < tokens).to(gl.int32), 32)
        score = gl.where((inside != 0)[:, None], score * log2_scale, float("-inf"))
        top, total, alpha, p = softmax_step(score, top, total, 32)
        o = mma_v2(plain_value_operand(v, D), probability_operand(p.to(v.dtype), 32),
                   o * alpha[None, :])
    return top, total, o


@gluon.jit
def store_partial(partial, lse, top, total, o, GROUP: gl.constexpr, D: gl.constexpr):
    """Write o / total as (GROUP, D), and log2 of the softmax's denominator, top + log2 total, as (GROUP)."""
    total = warp_sums(total)
    o = channel_rows(o / total[None, :], D)
    head = gl.arange(0, 8, layout=gl.SliceLayout(1, output_layout(D)))
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, output_layout(D)))
    gl.store(partial + head[:, None] * D + channel[None, :], o, mask=(head < GROUP)[:, None] & (channel < D)[None, :])
    head = gl.arange(0, 8, layout=gl.SliceLayout(0, accumulator()))
    gl.store(lse + head, top + gl.log2(total), mask=head < GROUP)
