"""Store new keys and values of per-token formats, one launch a layer: quantize, pack, write each to its own place.

The formulas and their exactness are those of rounding.py, over groups of channels of one token; the bytes are in the
plain order of layout.py.  The grid depends on the number of tokens alone; padded tokens have location 0, which is in
page 0.

    key, value (tokens, kv_heads, D), rows strided; locations = out_cache_loc (tokens), any integer type
    codes (pages, kv_heads, page, D * bits / 8) uint8; meta (pages, kv_heads, page, groups, 1 or 2) fp16
"""

import torch
import triton
import triton.language as tl

from kvtuner_triton.decode import PackedPages
from kvtuner_triton.rounding import quantize, scale_and_zero

BLOCK = 16  # tokens a program


@triton.jit(do_not_specialize=["count"])
def token_kernel(key, value, key_codes, key_meta, value_codes, value_meta, locations, count, key_stride, value_stride,
                 KV_HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, KEY_BITS: tl.constexpr,
                 KEY_GROUPS: tl.constexpr, KEY_META: tl.constexpr, VALUE_BITS: tl.constexpr,
                 VALUE_GROUPS: tl.constexpr, VALUE_META: tl.constexpr, T: tl.constexpr):
    """Program (i, head, 0) does the keys of tokens T i .. T i + T - 1, program (i, head, 1) the values."""
    head = tl.program_id(1)
    token = tl.program_id(0) * T + tl.arange(0, T)
    inside = token < count
    place = tl.load(locations + token, mask=inside, other=0).to(tl.int64)
    at = (place // PAGE * KV_HEADS + head) * PAGE + place % PAGE
    token = token.to(tl.int64)
    if tl.program_id(2) == 0:
        store_tokens(key + token * key_stride + head * D, at, inside, key_codes, key_meta, T, D, KEY_BITS, KEY_GROUPS,
                     KEY_META)
    else:
        store_tokens(value + token * value_stride + head * D, at, inside, value_codes, value_meta, T, D, VALUE_BITS,
                     VALUE_GROUPS, VALUE_META)


@triton.jit
def store_tokens(source, at, inside, codes, meta, T: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr,
                 GROUPS: tl.constexpr, META: tl.constexpr):
    """Rows of D at `source` (T) become rows `at` of codes (rows, D * BITS / 8) and meta (rows, GROUPS, META)."""
    PER: tl.constexpr = 8 // BITS
    x = tl.load(source[:, None] + tl.arange(0, D)[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    x = tl.reshape(x, [T, GROUPS, D // GROUPS])
    scale, zero = scale_and_zero(tl.min(x, axis=2), tl.max(x, axis=2), BITS, META)
    meta += (at * (GROUPS * META))[:, None] + tl.arange(0, GROUPS)[None, :] * META
    tl.store(meta, scale.to(tl.float16), mask=inside[:, None])
    if META == 2:
        tl.store(meta + 1, zero.to(tl.float16), mask=inside[:, None])
    code = tl.reshape(quantize(x, scale[:, :, None], zero[:, :, None], BITS, META), [T, D])
    code = code << (tl.arange(0, D) % PER * BITS)[None, :]
    byte = tl.sum(tl.reshape(code, [T, D // PER, PER]), axis=2).to(tl.uint8)
    tl.store(codes + (at * (D // PER))[:, None] + tl.arange(0, D // PER)[None, :], byte, mask=inside[:, None])


def store_by_location(key: torch.Tensor, value: torch.Tensor, keys: PackedPages, values: PackedPages,
                      locations: torch.Tensor) -> None:
    """Store key and value (tokens, kv_heads, head_dim) at `locations` (tokens): page * page size + offset."""
    count, kv_heads, head_dim = key.shape
    token_kernel[(triton.cdiv(count, BLOCK), kv_heads, 2)](
        key, value, keys.codes, keys.meta, values.codes, values.meta, locations, count, key.stride(0), value.stride(0),
        KV_HEADS=kv_heads, D=head_dim, PAGE=keys.codes.shape[2], KEY_BITS=keys.bits, KEY_GROUPS=keys.meta.shape[3],
        KEY_META=keys.meta.shape[4], VALUE_BITS=values.bits, VALUE_GROUPS=values.meta.shape[3],
        VALUE_META=values.meta.shape[4], T=BLOCK)
