"""Dequantize stored tokens into a scratch buffer that a prefill reads, one launch a layer.

    x' = code * scale + zero,  or (code - 2^(bits - 1)) * scale if symmetric (scale may be negative),
    boosted key channels (sign bit of scale set; asymmetric, 4 bits): x' = (code * 16 + half) * |scale| + zero

in fp32, then rounded to the model's dtype.  A code has at most 8 bits and a scale 11, so their product is exact in
fp32 whether or not it is contracted, and the sum is rounded once: the result equals reference.read_pages bit for bit
(but for the sign of a zero).

    key_out, value_out (tokens, kv_heads, D) bf16, fp16 or fp32      table = req_to_token (slots, table_stride) int32
    blocks (n, 4) int32, from unpack_blocks: slot, first position, tokens, row of key_out and value_out of the first
    per channel: codes in fragment order (fragments.py), a block is a page of 64 or 128 tokens
        key meta (pages, kv_heads, 1 or 2, D), value meta (pages, kv_heads, page, 1, 1 or 2) fp16
        extra (pages, kv_heads, page * D / 32) uint8: halves of boosted channels, in 16-bit units little end first;
        unit (token // 4) * D / 16 + slot of the channel has token % 4 at bit 4 * (token % 4)
    per token: codes (pages, kv_heads, page, D * bits / 8) uint8 in plain order (layout.py), pages of any size, a block
        is up to BLOCK tokens, each found by its own place; meta (pages, kv_heads, page, groups, 1 or 2) fp16

Bytes a token and kv head at D = 128, page 64, bf16: 512 written; read kv8 268, kv4 140 (boosted, symmetric values 142),
kv2 76.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from kvtuner_triton.decode import PackedPages
from kvtuner_triton.decode_portable import load_meta
from kvtuner_triton.decode_token import load_meta as load_token_meta
from kvtuner_triton.slots import boost_slot

BLOCK = 64  # tokens of a block of per-token formats
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit(do_not_specialize=["table_stride"])
def page_kernel(key_codes, key_meta, extra, value_codes, value_meta, table, blocks, key_out, value_out, table_stride,
                KV_HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, KEY_BITS: tl.constexpr,
                KEY_META: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_META: tl.constexpr, BOOST: tl.constexpr):
    """Program (i, head, 0) does the keys of page i and kv head `head`, program (i, head, 1) the values."""
    head = tl.program_id(1)
    block = blocks + 4 * tl.program_id(0)
    slot = tl.load(block).to(tl.int64)
    page = tl.load(table + slot * table_stride + tl.load(block + 1)).to(tl.int64) // PAGE
    at = page * KV_HEADS + head
    row = tl.load(block + 3).to(tl.int64)
    out = (row * KV_HEADS + head) * D + tl.arange(0, PAGE)[:, None] * (KV_HEADS * D) + tl.arange(0, D)[None, :]
    if tl.program_id(2) == 0:
        unpack_keys(key_codes + at * (PAGE * D * KEY_BITS // 8), key_meta + at * (D * KEY_META), extra, at,
                    key_out + out, D, PAGE, KEY_BITS, KEY_META, BOOST)
    else:
        unpack_values(value_codes + at * (PAGE * D * VALUE_BITS // 8), value_meta + at * (PAGE * VALUE_META),
                      value_out + out, D, PAGE, VALUE_BITS, VALUE_META)


@triton.jit
def unpack_keys(codes, meta, extra, at, out, D: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr,
                META: tl.constexpr, BOOST: tl.constexpr):
    """A page: one scale a channel; `extra` is that of all pages, this one's is number `at`."""
    code = key_codes_of(codes, D, PAGE, BITS)
    channel = tl.arange(0, D)
    scale, zero = load_meta(meta + channel, D, BITS, META)
    if BOOST:
        boosted = scale < 0  # -0 is missed: any code will do
        half = halves(extra + at * (PAGE * D // 32), channel, boosted, D, PAGE)
        code = (code << tl.where(boosted, 4, 0)[None, :]) | half
        scale = tl.abs(scale)
    x = to_float(code) * scale[None, :] + zero[None, :]
    tl.store(out, rounded(x, out.dtype.element_ty))


@triton.jit
def unpack_values(codes, meta, out, D: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr, META: tl.constexpr):
    """A page: one scale a token."""
    scale, zero = load_meta(meta + tl.arange(0, PAGE) * META, 1, BITS, META)
    x = to_float(value_codes_of(codes, D, PAGE, BITS)) * scale[:, None] + zero[:, None]
    tl.store(out, rounded(x, out.dtype.element_ty))


@triton.jit
def halves(extra, channel, boosted, D: tl.constexpr, PAGE: tl.constexpr):
    """Low halves of the codes of boosted channels, 0 of others -> (PAGE, D) int32."""
    units = extra.to(tl.pointer_type(tl.uint16)) + boost_slot(channel)[None, :]
    units += tl.arange(0, PAGE // 4)[:, None] * (D // 16)
    unit = tl.load(units, mask=boosted[None, :], other=0).to(tl.int32)  # one load for four tokens
    half = (unit[:, None, :] >> (4 * tl.arange(0, 4))[None, :, None]) & 15
    return tl.reshape(half, [PAGE, D])


@triton.jit
def key_codes_of(codes, D: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr):
    """Keys of a page from fragment order -> (PAGE, D) int32."""
    PER: tl.constexpr = 8 // BITS
    byte = load_bytes(codes, PAGE * D * BITS // 8, PAGE // 32)
    byte = tl.reshape(byte, [PAGE // 32, D // 8 // PER, 2, 8, 4, 2, 2])  # tile, u // per, m, g, t, e, half
    byte = tl.permute(byte, (0, 3, 2, 6, 4, 1, 5))  # tile, g, m, half | t, u // per, e
    code = tl.reshape(fields(byte, BITS), [PAGE, D // 2 // PER, 2, PER])
    return tl.reshape(tl.permute(code, (0, 1, 3, 2)), [PAGE, D]).to(tl.int32)


@triton.jit
def value_codes_of(codes, D: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr):
    """Values of a page from fragment order -> (PAGE, D) int32."""
    PER: tl.constexpr = 8 // BITS
    byte = load_bytes(codes, PAGE * D * BITS // 8, PAGE // 32)
    byte = tl.reshape(byte, [PAGE // 32, 4 // PER, D // 16, 8, 4, 2, 2])  # tile, u // per, m, g, t, e, half
    byte = tl.permute(byte, (0, 4, 5, 1, 3, 2, 6))  # tile, t, e, u // per | g, m, half
    code = tl.reshape(fields(byte, BITS), [PAGE // PER, D, PER])
    return tl.reshape(tl.permute(code, (0, 2, 1)), [PAGE, D]).to(tl.int32)


@triton.jit
def load_bytes(codes, SIZE: tl.constexpr, TILES: tl.constexpr):
    """The inverse of store.store_bytes: bytes in the order (tile, word, lane, byte of the word)."""
    byte = tl.reshape(tl.load(codes + tl.arange(0, SIZE)), [TILES, SIZE // TILES // 512, 32, 4, 4])
    return tl.permute(byte, (0, 1, 3, 2, 4))


@triton.jit
def fields(byte, BITS: tl.constexpr):
    """The codes in bytes uint8, along a new last dimension (two, with 2 bits), little end first."""
    if BITS == 4:
        byte = tl.join(byte & 15, byte >> 4)
    elif BITS == 2:
        byte = tl.join(tl.join(byte & 3, byte >> 4 & 3), tl.join(byte >> 2 & 3, byte >> 6))
    return byte


@triton.jit
def to_float(code):
    """Codes int32 as fp32, by the bits of 2^23 + code: GPUs convert integers at a quarter of the rate of the rest."""
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x fp32 to the nearest of `dtype`; by hand where the interpreter would cut off what bf16 does not hold."""
    if INTERPRETED:  # noqa: SIM102 - decided when compiling
        if dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit(do_not_specialize=["table_stride"])
def token_kernel(key_codes, key_meta, value_codes, value_meta, table, blocks, key_out, value_out, table_stride,
                 KV_HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, KEY_BITS: tl.constexpr,
                 KEY_GROUPS: tl.constexpr, KEY_META: tl.constexpr, VALUE_BITS: tl.constexpr,
                 VALUE_GROUPS: tl.constexpr, VALUE_META: tl.constexpr, T: tl.constexpr):
    """Program (i, head, 0) does the keys of block i and kv head `head`, program (i, head, 1) the values."""
    head = tl.program_id(1)
    block = blocks + 4 * tl.program_id(0)
    slot = tl.load(block).to(tl.int64)
    token = tl.arange(0, T)
    inside = token < tl.load(block + 2)
    place = tl.load(table + slot * table_stride + tl.load(block + 1) + token, mask=inside, other=0).to(tl.int64)
    at = (place // PAGE * KV_HEADS + head) * PAGE + place % PAGE
    out = ((tl.load(block + 3).to(tl.int64) + token) * KV_HEADS + head) * D
    if tl.program_id(2) == 0:
        unpack_tokens(key_codes, key_meta, at, inside, key_out + out, T, D, KEY_BITS, KEY_GROUPS, KEY_META)
    else:
        unpack_tokens(value_codes, value_meta, at, inside, value_out + out, T, D, VALUE_BITS, VALUE_GROUPS, VALUE_META)


@triton.jit
def unpack_tokens(codes, meta, at, inside, out, T: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr,
                  GROUPS: tl.constexpr, META: tl.constexpr):
    """Rows `at` of codes (rows, D * BITS / 8) and meta (rows, GROUPS, META) become rows of D at `out` (T)."""
    WIDTH: tl.constexpr = D * BITS // 8
    inside = inside[:, None]
    byte = tl.load(codes + at[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], mask=inside, other=0)
    code = tl.reshape(fields(byte, BITS), [T, GROUPS, D // GROUPS]).to(tl.int32)
    meta += (at * (GROUPS * META))[:, None] + (tl.arange(0, GROUPS) * META)[None, :]
    scale, zero = load_token_meta(meta, inside, BITS, META)
    x = tl.reshape(to_float(code) * scale[:, :, None] + zero[:, :, None], [T, D])
    tl.store(out[:, None] + tl.arange(0, D)[None, :], rounded(x, out.dtype.element_ty), mask=inside)


def unpack_pages(keys: PackedPages, values: PackedPages, req_to_token: torch.Tensor, blocks: torch.Tensor,
                 key_out: torch.Tensor, value_out: torch.Tensor) -> None:
    """Per-channel formats: unpack the pages of `blocks`, from unpack_blocks with size = page, on the device."""
    _, kv_heads, head_dim = key_out.shape
    page = keys.codes.shape[2]
    if len(blocks):
        page_kernel[(len(blocks), kv_heads, 2)](
            keys.codes, keys.meta, keys.extra, values.codes, values.meta, req_to_token, blocks, key_out, value_out,
            req_to_token.stride(0), KV_HEADS=kv_heads, D=head_dim, PAGE=page, KEY_BITS=keys.bits,
            KEY_META=keys.meta.shape[2], VALUE_BITS=values.bits, VALUE_META=values.meta.shape[4],
            BOOST=keys.extra is not None, num_warps=page // 16)


def unpack_by_location(keys: PackedPages, values: PackedPages, req_to_token: torch.Tensor, blocks: torch.Tensor,
                       key_out: torch.Tensor, value_out: torch.Tensor) -> None:
    """Per-token formats: unpack the tokens of `blocks`, from unpack_blocks with size = BLOCK, on the device."""
    _, kv_heads, head_dim = key_out.shape
    if len(blocks):
        token_kernel[(len(blocks), kv_heads, 2)](
            keys.codes, keys.meta, values.codes, values.meta, req_to_token, blocks, key_out, value_out,
            req_to_token.stride(0), KV_HEADS=kv_heads, D=head_dim, PAGE=keys.codes.shape[2], KEY_BITS=keys.bits,
            KEY_GROUPS=keys.meta.shape[3], KEY_META=keys.meta.shape[4], VALUE_BITS=values.bits,
            VALUE_GROUPS=values.meta.shape[3], VALUE_META=values.meta.shape[4], T=BLOCK)


def stored_tokens(ends: Sequence[int], page: int | None) -> np.ndarray:
    """How many tokens of each request a pass up to `ends` may read as stored: (requests,) int64, scratch rows.

    page: of per-channel formats, whose last page is read in full precision; None: per token, everything.
    """
    end = np.asarray(ends, dtype=np.int64)
    return end if page is None else np.maximum(end - 1, 0) // page * page


def unpack_blocks(slots: Sequence[int], tokens: Sequence[int], size: int) -> torch.Tensor:
    """The first tokens[b] tokens of slots[b], one request after the other in scratch -> blocks (n, 4) int32, CPU."""
    slot, count = np.asarray(slots, dtype=np.int64), np.asarray(tokens, dtype=np.int64)
    blocks_of = -(-count // size)
    b = np.repeat(np.arange(len(slot)), blocks_of)
    first = (np.arange(len(b)) - (np.cumsum(blocks_of) - blocks_of)[b]) * size
    rows = (np.cumsum(count) - count)[b] + first
    blocks = np.stack([slot[b], first, np.minimum(count[b] - first, size), rows], 1)
    return torch.from_numpy(blocks.astype(np.int32))
