"""Merge the partial results of one decode step: out = sum_i 2^(lse_i - top) partial_i / sum_i 2^(lse_i - top).

The rows of request b are its page in progress, row b, and its chunks, spans[b, 0] .. + spans[b, 1] (decode_plan.py).
Bytes: 4 (D + 1) a row and query head read, 2 D a request and query head written.
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["q_heads"])
def merge_kernel(partial, lse, spans, out, q_heads, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """partial (rows, q_heads, D) fp32, lse (rows, q_heads) fp32 base 2 -> out (batch, q_heads, D)."""
    b = tl.program_id(0)
    head = tl.program_id(1)
    channel = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(spans + b * 2)
    count = tl.load(spans + b * 2 + 1)
    tail = (b * q_heads + head).to(tl.int64)
    top = tl.load(lse + tail)
    weight = 1.0
    total = tl.load(partial + tail * D + channel)
    for start in range(0, count, ROWS):
        i = start + tl.arange(0, ROWS)
        row = ((first + i) * q_heads + head).to(tl.int64)
        x = tl.load(lse + row, mask=i < count, other=float("-inf"))
        value = tl.load(partial + row[:, None] * D + channel[None, :], mask=(i < count)[:, None], other=0.0)
        new_top = tl.maximum(top, tl.max(x, axis=0))
        w = tl.exp2(x - new_top)
        old = tl.exp2(top - new_top)
        total = total * old + tl.sum(value * w[:, None], axis=0)
        weight = weight * old + tl.sum(w, axis=0)
        top = new_top
    tl.store(out + tail * D + channel, (total / weight).to(out.dtype.element_ty))


def merge(partial: torch.Tensor, lse: torch.Tensor, spans: torch.Tensor, out: torch.Tensor) -> None:
    """partial (rows, q_heads, D) fp32, lse (rows, q_heads) fp32, spans (batch, 2) int32 -> out (batch, q_heads, D)."""
    batch, q_heads, head_dim = out.shape
    # As many rows at a time as an even batch has, so that all loads go out together, two or so a thread; more rows,
    # fewer channels.
    rows = min(512, max(8, triton.next_power_of_2(-(-(partial.shape[0] - batch) // batch))))
    block = min(head_dim, max(8, 2048 // rows))
    merge_kernel[(batch, q_heads, head_dim // block)](partial, lse, spans, out, q_heads, D=head_dim, BLOCK_D=block,
                                                      ROWS=rows, num_warps=max(4, rows * block // 256))
