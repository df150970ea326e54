"""The truth in plain torch: quantize, pack, unpack, dequantize.  Kernels must produce the same bytes.

Asymmetric, b bits, over a group x:   zero = fp16(min x), scale = fp16((max x - min x) / (2^b - 1)),
                                      code = clamp(floor((x - zero) / scale + 1/2), 0, 2^b - 1),
                                      x' = code * scale + zero
Symmetric, far = the x with the largest |x| (at a tie the positive):
                                      scale = fp16(-far / 2^(b-1)),
                                      code = clamp(floor(x / scale + 1/2) + 2^(b-1), 0, 2^b - 1),
                                      x' = (code - 2^(b-1)) * scale
so a symmetric scale has a sign, and `far` gets code 0: all 2^b codes are used, as in llama.cpp's Q4_0, and steps are an
eighth shorter than those of max |x| / 7.
All arithmetic is fp32; codes are taken against the rounded fp16 scale and zero, so rounding those costs no accuracy
twice.  A scale that rounds to zero means a constant group: code 0 (symmetric: 2^(b-1)), x' = zero (symmetric: 0).

Boosted keys (asymmetric, 4 bits, per channel): of each page and kv head one channel of every slot
(layout.boost_slots), head_dim / 16 in all, is quantized to 8 bits: the channel c with the largest w_c r_c^2, the lower
at a tie.  r_c is max k_c - min k_c, what the step is proportional to; w_c is the sum of q_c^2 over this rank's query
heads of the kv head at the page's last position.  So w_c r_c^2 is, up to a constant, the mean square that rounding
channel c adds to that query's scores.  It depends on the page's own tokens alone, needs no calibration, and is known in
the step that completes the page.  Such a code is stored in two halves, and the sign bit of the channel's scale, which
is never negative, says so.  Codes are bit for bit defined given w; how w is summed is not.
"""

import torch

from kvtuner_sglang.quant import TensorFormat
from kvtuner_sglang.quant.format import BOOST_DIVISOR
from kvtuner_triton import fragments
from kvtuner_triton.layout import Order, PackedTensor, boost_slots

FP16_MAX = 65504.0
PAGES_AT_ONCE = 4096  # dequantizing takes several temporaries in fp32


def quantize(x: torch.Tensor, bits: int, *, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and metadata of groups that lie along the last dimension.

    x: (..., n) any float dtype -> codes (..., n) uint8, one a byte; meta (..., m) fp16, m = 1 scale or 2 scale, zero.
    """
    x = x.float()
    if symmetric:
        half = 2 ** (bits - 1)
        low, high = x.aminmax(dim=-1, keepdim=True)
        scale = _fp16(torch.where(high >= -low, high, low) / -half)
        steps = torch.floor(x / _no_zero(scale) + 0.5) + half
        codes = torch.where(scale != 0, steps.clamp(0, 2 * half - 1), torch.full_like(steps, half))
        return codes.to(torch.uint8), scale.half()
    top = 2**bits - 1
    low, high = x.aminmax(dim=-1, keepdim=True)
    zero, scale = _fp16(low), _fp16((high - low) / top)
    codes = torch.floor((x - zero) / _no_zero(scale) + 0.5).clamp(0, top)
    codes = torch.where(scale > 0, codes, torch.zeros_like(codes))
    return codes.to(torch.uint8), torch.cat([scale, zero], -1).half()


def dequantize(codes: torch.Tensor, meta: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse map: codes (..., n) uint8, meta (..., m) fp16 -> (..., n) fp32."""
    scale = meta[..., :1].float()
    if meta.shape[-1] == 1:
        return (codes.float() - 2 ** (bits - 1)) * scale
    return codes.float() * scale + meta[..., 1:].float()


def pack(codes: torch.Tensor, bits: int, order: Order = "plain") -> torch.Tensor:
    """codes (..., n), one a byte -> (..., n * bits / 8) bytes; in fragment order (..., page, head_dim)."""
    if order != "plain":
        return (fragments.order_keys if order == "keys" else fragments.order_values)(codes, bits)
    per_byte = 8 // bits
    parts = codes.unflatten(-1, (-1, per_byte)).to(torch.int32)
    shifts = torch.arange(0, 8, bits, device=codes.device, dtype=torch.int32)
    return (parts << shifts).sum(-1).to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int, order: Order = "plain") -> torch.Tensor:
    """The inverse of pack."""
    if order != "plain":
        return (fragments.restore_keys if order == "keys" else fragments.restore_values)(packed, bits)
    shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)


Encoded = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def encode(fmt: TensorFormat, x: torch.Tensor, weight: torch.Tensor | None = None, order: Order = "plain") -> Encoded:
    """Packed codes, metadata and second halves (or None) of x: (..., tokens, head_dim) in the layout of layout.py.

    Per channel the tokens of x must be one whole page: its minimum and maximum are the group's.  Boosted keys need
    weight: (..., head_dim), see score_weights.
    """
    if fmt.boosted:
        return _encode_boosted(fmt, x, weight, order)
    if fmt.per_channel:
        codes, meta = quantize(x.transpose(-1, -2), fmt.bits, symmetric=fmt.symmetric)
        return pack(codes.transpose(-1, -2), fmt.bits, order), meta.transpose(-1, -2), None
    groups = fmt.groups(x.shape[-1])
    codes, meta = quantize(x.unflatten(-1, (groups, -1)), fmt.bits, symmetric=fmt.symmetric)
    return pack(codes.flatten(-2), fmt.bits, order), meta, None


def decode(fmt: TensorFormat, packed: torch.Tensor, meta: torch.Tensor, extra: torch.Tensor | None = None,
           order: Order = "plain") -> torch.Tensor:
    """The inverse of encode: (..., tokens, head_dim) fp32."""
    codes = unpack(packed, fmt.bits, order)
    if fmt.boosted:
        return _decode_boosted(fmt, codes, meta, extra, order)
    if fmt.per_channel:
        return dequantize(codes.transpose(-1, -2), meta.transpose(-1, -2), fmt.bits).transpose(-1, -2)
    groups = meta.shape[-2]
    return dequantize(codes.unflatten(-1, (groups, -1)), meta, fmt.bits).flatten(-2)


def score_weights(q: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """q (..., q_heads, head_dim) at the last position of pages -> (..., kv_heads, head_dim) fp32: sum of squares."""
    return q.float().unflatten(-2, (kv_heads, -1)).square().sum(-2)


def most_important(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Which channels of pages x (..., tokens, head_dim) are boosted, (..., head_dim) bool; weight (..., head_dim)."""
    if weight is None:
        raise ValueError("boosted keys need the weights of their channels")
    low, high = x.float().aminmax(dim=-2)
    importance = weight * (high - low).square()
    by_slot, inverse = _channels_by_slot(x.shape[-1], x.device)
    importance = importance[..., by_slot]  # (..., slots, channels of the slot)
    chosen = torch.zeros_like(importance, dtype=torch.bool)
    chosen.scatter_(-1, importance.argmax(-1, keepdim=True), True)
    return chosen.flatten(-2)[..., inverse]


def _channels_by_slot(head_dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels (slots, head_dim / slots), ascending in each slot, and where each channel is in that, flat."""
    by_slot = boost_slots(head_dim).argsort(stable=True)
    return by_slot.view(head_dim // BOOST_DIVISOR, -1).to(device), by_slot.argsort().to(device)


def _encode_boosted(fmt: TensorFormat, x: torch.Tensor, weight: torch.Tensor | None, order: Order) -> Encoded:
    chosen = most_important(x, weight)[..., None, :]
    channels = x.transpose(-1, -2)
    codes, meta = (t.transpose(-1, -2) for t in quantize(channels, fmt.bits, symmetric=False))
    fine, fine_meta = (t.transpose(-1, -2) for t in quantize(channels, 2 * fmt.bits, symmetric=False))
    codes, meta = torch.where(chosen, fine >> fmt.bits, codes), torch.where(chosen, fine_meta, meta)
    scale = meta[..., :1, :].abs()  # its sign bit is the mark, so it must not be -0
    meta = torch.cat([torch.where(chosen, -scale, scale), meta[..., 1:, :]], -2)
    halves = torch.where(chosen, fine & (2**fmt.bits - 1), torch.zeros_like(fine))
    halves = halves[..., _channels_by_slot(x.shape[-1], x.device)[0]].sum(-1, dtype=torch.uint8)
    extra = pack(halves, fmt.bits) if order == "plain" else fragments.order_slots(halves)
    return pack(codes, fmt.bits, order), meta, extra


def _decode_boosted(fmt: TensorFormat, codes: torch.Tensor, meta: torch.Tensor, extra: torch.Tensor | None,
                    order: Order) -> torch.Tensor:
    if extra is None:
        raise ValueError("boosted keys need the second halves of their codes")
    halves = unpack(extra, fmt.bits) if order == "plain" else fragments.restore_slots(extra)
    halves = halves[..., boost_slots(codes.shape[-1]).to(codes.device)]
    scale, zero = meta[..., :1, :].float(), meta[..., 1:, :].float()
    codes = torch.where(torch.signbit(scale), codes << fmt.bits | halves, codes)
    return codes.float() * scale.abs() + zero


def write_tokens(store: PackedTensor, page: torch.Tensor, offset: torch.Tensor, x: torch.Tensor) -> None:
    """Store single tokens (per-token or 16-bit formats). page, offset: (n,) int64; x: (n, kv_heads, head_dim)."""
    if store.meta is None:
        store.codes[page, :, offset] = x.to(store.codes.dtype)
        return
    codes, meta, _ = encode(store.fmt, x)
    store.codes[page, :, offset] = codes
    store.meta[page, :, offset] = meta


def write_pages(store: PackedTensor, page: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None = None) -> None:
    """Store whole pages (any format).

    page: (n,) int64; x: (n, kv_heads, page_size, head_dim); weight: (n, kv_heads, head_dim), for boosted keys.
    """
    if store.meta is None:
        store.codes[page] = x.to(store.codes.dtype)
        return
    store.codes[page], store.meta[page], extra = encode(store.fmt, x, weight, store.order)
    if store.extra is not None:
        store.extra[page] = extra


def read_pages(store: PackedTensor, page: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Pages as attention sees them: page (n,) int64 -> (kv_heads, n * page_size, head_dim) in `dtype`."""
    parts = [_read(store, part, dtype) for part in page.split(PAGES_AT_ONCE)]
    x = torch.cat(parts) if len(parts) != 1 else parts[0]
    return x.transpose(0, 1).flatten(1, 2)


def _read(store: PackedTensor, page: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if store.meta is None:
        return store.codes[page].to(dtype)
    extra = None if store.extra is None else store.extra[page]
    return decode(store.fmt, store.codes[page], store.meta[page], extra, store.order).to(dtype)


def _fp16(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-FP16_MAX, FP16_MAX).half().float()


def _no_zero(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale != 0, scale, torch.ones_like(scale))
