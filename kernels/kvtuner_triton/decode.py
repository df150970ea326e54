"""Decode attention over packed pages: what an attention backend calls.

    workspace = DecodeWorkspace(batch, q_heads, kv_heads, head_dim, page, device)   # once a batch size
    workspace.plan(seq_lens, req_pool_indices)                                      # once a step, for all layers
    decode_attention(workspace, q, keys, values, ...)                               # once a layer

All three launch kernels whose grids depend on the batch size alone, and none waits for the device: plan and
decode_attention can be captured in a CUDA graph.
"""

from dataclasses import dataclass, field

import torch
import triton

from kvtuner_triton.decode_hopper import decode_kernel
from kvtuner_triton.decode_merge import merge
from kvtuner_triton.decode_plan import make_plan, plan_rows
from kvtuner_triton.decode_portable import portable_kernel


@dataclass(frozen=True)
class Tuning:
    """How the kernel is run.

    step_tokens: tokens a step; stages: steps in the ring; programs_per_sm: programs that share a multiprocessor, no
    more than registers and shared memory allow.
    """

    step_tokens: int = 64
    stages: int = 2
    programs_per_sm: int = 12


def default_tuning(key_bits: int, value_bits: int) -> Tuning:
    """Chosen on an H100: as many programs as fit while each has a step in flight; 8-bit steps leave room for fewer."""
    total = key_bits + value_bits
    if total <= 4:
        return Tuning(stages=3)
    if total <= 8:
        return Tuning()
    return Tuning(step_tokens=32, stages=3, programs_per_sm=10) if total <= 12 else Tuning(programs_per_sm=6)


class DecodeBuffers:
    """Scratch of one decode step, each at least as large as the workspace needs.

    plan_table (rows, 4) int32, spans (batch, 2) int32, partial (rows, q_heads, head_dim) and lse (rows, q_heads) fp32.
    """

    def __init__(self, rows: int, batch: int, q_heads: int, head_dim: int, device: torch.device | str) -> None:
        self.plan_table = torch.full((rows, 4), -1, dtype=torch.int32, device=device)
        self.spans = torch.zeros((batch, 2), dtype=torch.int32, device=device)
        self.partial = torch.empty((rows, q_heads, head_dim), dtype=torch.float32, device=device)
        self.lse = torch.empty((rows, q_heads), dtype=torch.float32, device=device)


@dataclass
class DecodeWorkspace:
    """Views of the buffers of one decode step, shared by all layers of a rank.

    rows = SMs * programs_per_sm / kv_heads, more if the batch needs it (decode_plan.plan_rows);
    portable: use plain Triton; None: where the fragment kernel cannot run.  It always is for an fp32 q;
    buffers: those of the workspace of the largest batch, if workspaces of one model share them, which they may unless
    they are planned in the same step; None: own ones.
    """

    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    page: int
    device: torch.device | str
    tuning: Tuning = field(default_factory=Tuning)
    multiprocessors: int | None = None
    portable: bool | None = None
    buffers: DecodeBuffers | None = None

    def __post_init__(self) -> None:
        if self.multiprocessors is None:
            cuda = torch.device(self.device).type == "cuda"  # a CPU interprets one program after the other
            self.multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count if cuda else 1
        if self.portable is None:
            self.portable = not has_fragments(self.device) or self.q_heads > 8 * self.kv_heads
        rows = plan_rows(self.batch, self.multiprocessors * self.tuning.programs_per_sm // self.kv_heads)
        if self.buffers is None:
            self.buffers = DecodeBuffers(rows, self.batch, self.q_heads, self.head_dim, self.device)
        if len(self.buffers.plan_table) < rows or len(self.buffers.spans) < self.batch:
            raise ValueError(f"buffers of {len(self.buffers.plan_table)} rows for {len(self.buffers.spans)} requests "
                             f"do not hold a step of {rows} rows for {self.batch}")
        self.plan_table, self.spans = self.buffers.plan_table[:rows], self.buffers.spans[:self.batch]
        self.partial, self.lse = self.buffers.partial[:rows], self.buffers.lse[:rows]

    def plan(self, seq_lens: torch.Tensor, req_pool_indices: torch.Tensor) -> None:
        """Divide the step's work. Both (batch,), any integer type; seq_lens count the token being decoded."""
        make_plan(seq_lens, req_pool_indices, self.plan_table, self.spans, self.page)


@dataclass(frozen=True)
class PackedPages:
    """Keys, or values, of one layer as layout.py has them; per channel and beside it in fragment order.

    extra: boosted keys only, (pages, kv_heads, page, head_dim / 32) uint8.
    """

    bits: int
    codes: torch.Tensor
    meta: torch.Tensor
    extra: torch.Tensor | None = None


def decode_attention(workspace: DecodeWorkspace, q: torch.Tensor, keys: PackedPages, values: PackedPages,
                     tail_key: torch.Tensor, tail_value: torch.Tensor, req_to_token: torch.Tensor, sm_scale: float,
                     out: torch.Tensor) -> torch.Tensor:
    """out (batch, q_heads, head_dim) = attention of q, same shape, by the visibility rule; `workspace` is planned.

    keys, values: PackedPages (pages, kv_heads, ...); tail_key, tail_value: (slots, page, kv_heads, head_dim) of the
    model's dtype, that of q and out; req_to_token: (slots, max_context) int32.
    """
    attend_rows(workspace, q, keys, values, tail_key, tail_value, req_to_token, sm_scale)
    merge(workspace.partial, workspace.lse, workspace.spans, out)
    return out


def attend_rows(workspace: DecodeWorkspace, q: torch.Tensor, keys: PackedPages, values: PackedPages,
                tail_key: torch.Tensor, tail_value: torch.Tensor, req_to_token: torch.Tensor,
                sm_scale: float) -> None:
    """The partial results of every row of the plan, into workspace.partial and workspace.lse."""
    w = workspace
    grid = (w.kv_heads, w.plan_table.shape[0])
    extra = keys.extra
    shape = {"KV_HEADS": w.kv_heads, "GROUP": w.q_heads // w.kv_heads, "D": w.head_dim, "PAGE": w.page,
             "KEY_BITS": keys.bits, "KEY_META": keys.meta.shape[2], "VALUE_BITS": values.bits,
             "VALUE_META": values.meta.shape[4], "BOOSTED": extra is not None}
    rest = (tail_key, tail_value, req_to_token, w.plan_table, w.partial, w.lse, sm_scale, w.batch,
            req_to_token.stride(0))
    if w.portable or q.dtype == torch.float32:
        heads = max(16, triton.next_power_of_2(shape["GROUP"]))
        portable_kernel[grid](q, keys.codes, keys.meta, extra, values.codes, values.meta, *rest, **shape, HEADS=heads)
        return
    words = (None if x is None else x.view(-1).view(torch.int32)
             for x in (keys.codes, keys.meta, extra, values.codes, values.meta))
    decode_kernel[grid](q, *words, *rest, **shape, T=w.tuning.step_tokens, STAGES=w.tuning.stages,
                        num_warps=1)


def has_fragments(device: torch.device | str) -> bool:
    """Whether the device has mma.sync m16n8k16, cp.async and movmatrix: NVIDIA GPUs from sm_80."""
    cuda = torch.device(device).type == "cuda" and torch.version.cuda is not None
    return cuda and torch.cuda.get_device_capability(device) >= (8, 0)
