"""What is compared: our decode kernels, FlashInfer's and SGLang's Triton ones, behind one interface.

A contender has the caches of several layers.  `plan` is what its backend does once a step, `layer(i)` what it does in
every layer; everything is ready to be captured in a CUDA graph once both ran.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from kvtuner_sglang.errors import RunFailed
from kvtuner_sglang.kernel_bench.caches import Batch, Layer, plain_dtype
from kvtuner_sglang.kernel_bench.cases import BLOCK, FLASHINFER, KVTUNER, SGLANG_TRITON, Storage
from kvtuner_triton.decode import DecodeWorkspace, decode_attention, default_tuning
from kvtuner_triton.decode_token import BLOCK as TOKEN_BLOCK
from kvtuner_triton.decode_token import decode_token_attention, token_tuning

PlainLayer = tuple[torch.Tensor, torch.Tensor]
FLASHINFER_WORKSPACE = 384 * 2**20  # bytes, as SGLang's default
SGLANG_KV_SPLITS = 8  # the default of --triton-attention-num-kv-splits
SCHEDULED_REQUESTS = 256  # what TritonAttnBackend schedules at least


class Contender(Protocol):
    """out (batch, q_heads, head_dim) bf16 holds the last layer's result; `options` names a choice among several."""

    kernel: str
    store: Storage
    options: str
    out: torch.Tensor

    @property
    def layers(self) -> int: ...

    def plan(self) -> None: ...

    def layer(self, i: int) -> None: ...


class Ours:
    """kvtuner_triton, as plugin/fused_backend.py runs it."""

    kernel = KVTUNER
    options = ""

    def __init__(self, batch: Batch, store: Storage, caches: Sequence[Layer],
                 multiprocessors: int | None = None) -> None:
        self.batch, self.store, self.caches = batch, store, caches
        fmt, shape = store.fmt, batch.shape
        tuning = default_tuning(fmt.key.bits, fmt.value.bits) if fmt.key.per_channel else token_tuning()
        self.work = DecodeWorkspace(len(batch.lengths), shape.q_heads, shape.kv_heads, shape.head_dim,
                                    store.page if fmt.key.per_channel else TOKEN_BLOCK, batch.q.device, tuning,
                                    multiprocessors)
        self.out = torch.empty_like(batch.q)

    @property
    def layers(self) -> int:
        return len(self.caches)

    def plan(self) -> None:
        self.work.plan(self.batch.seq_lens, self.batch.slots)

    def layer(self, i: int) -> None:
        b, c = self.batch, self.caches[i]
        if self.store.fmt.key.per_channel:
            decode_attention(self.work, b.q, c.keys, c.values, c.tail_key, c.tail_value, b.table, b.sm_scale, self.out)
        else:
            decode_token_attention(self.work, b.q, c.keys, c.values, b.table, b.sm_scale, self.out)


class FlashInfer:
    """Tensor-core decode over pages of BLOCK tokens, like ours; SGLang's FlashInfer backend itself plans pages of one.

    graph: plan as for a CUDA graph that is replayed at growing lengths, which is how SGLang serves; else for exactly
    these lengths.
    """

    kernel = FLASHINFER

    def __init__(self, batch: Batch, store: Storage, caches: Sequence[PlainLayer], workspace: torch.Tensor,
                 graph: bool) -> None:
        self.batch, self.store, self.caches = batch, store, caches
        self.options = "graph plan" if graph else "exact plan"
        self.out = torch.empty_like(batch.q)
        count = len(batch.lengths)
        pages = [-(-n // BLOCK) for n in batch.lengths]
        self.indptr = torch.tensor([0, *pages], dtype=torch.int32).cumsum(0).to(torch.int32)
        self.indices = torch.cat([batch.page_ids(b) for b in range(count)]).to(torch.int32)
        self.last = torch.tensor([(n - 1) % BLOCK + 1 for n in batch.lengths], dtype=torch.int32)
        device = batch.q.device
        buffers = {"use_cuda_graph": True, "paged_kv_indptr_buffer": self.indptr.to(device),
                   "paged_kv_indices_buffer": self.indices.clone(),
                   "paged_kv_last_page_len_buffer": self.last.to(device)} if graph else {}
        self.wrapper = flashinfer_wrapper()(workspace, "NHD", use_tensor_cores=True, **buffers)

    @property
    def layers(self) -> int:
        return len(self.caches)

    def plan(self) -> None:
        shape = self.batch.shape
        self.wrapper.plan(self.indptr, self.indices, self.last, shape.q_heads, shape.kv_heads, shape.head_dim, BLOCK,
                          q_data_type=torch.bfloat16, kv_data_type=plain_dtype(self.store),
                          sm_scale=self.batch.sm_scale)

    def layer(self, i: int) -> None:
        self.wrapper.run(self.batch.q, self.caches[i], out=self.out)


class SglangTriton:
    """SGLang's own decode kernel as TritonAttnBackend calls it, over pages of BLOCK tokens like ours."""

    kernel = SGLANG_TRITON
    options = ""

    def __init__(self, batch: Batch, store: Storage, caches: Sequence[PlainLayer]) -> None:
        self.batch, self.store = batch, store
        self.caches = [tuple(x.flatten(0, 1) for x in layer) for layer in caches]
        self.attend, self.schedule, self.use_pdl = sglang_triton_kernels()
        self.out = torch.empty_like(batch.q)
        device, count, shape = batch.q.device, len(batch.lengths), batch.shape
        self.indptr = torch.tensor([0, *batch.lengths], device=device).cumsum(0).to(torch.int32)
        self.indices = torch.cat([row[:n] for row, n in zip(batch.table, batch.lengths, strict=True)]).to(torch.int64)
        self.splits = torch.empty(count, dtype=torch.int32, device=device)
        self.logits = torch.empty((count, shape.q_heads, SGLANG_KV_SPLITS, shape.head_dim), device=device)
        self.lse = torch.empty((count, shape.q_heads, SGLANG_KV_SPLITS), device=device)
        self.cores = torch.cuda.get_device_properties(device).multi_processor_count

    @property
    def layers(self) -> int:
        return len(self.caches)

    def plan(self) -> None:
        shape, count = self.batch.shape, len(self.batch.lengths)
        scheduled = max(SCHEDULED_REQUESTS, 2 ** (count - 1).bit_length())
        self.schedule[(1,)](self.splits, self.batch.seq_lens, count, 1, shape.q_heads, shape.kv_heads,
                            SGLANG_KV_SPLITS, self.cores, MAX_NUM_SEQ=scheduled)

    def layer(self, i: int) -> None:
        self.attend(self.batch.q, *self.caches[i], self.out, self.indptr, self.indices, self.logits, self.lse,
                    self.splits, SGLANG_KV_SPLITS, self.batch.sm_scale, 1.0, 1.0, use_pdl=self.use_pdl,
                    page_size=BLOCK)


def flashinfer_wrapper() -> type:
    """FlashInfer's class; raises RunFailed if it cannot be imported."""
    try:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper
    except (ImportError, OSError, RuntimeError) as error:
        raise peer_failed(FLASHINFER, error) from error
    return BatchDecodeWithPagedKVCacheWrapper


def sglang_triton_kernels() -> tuple:
    """Decode attention, its scheduler and whether launches overlap; raises RunFailed if they cannot be imported."""
    try:
        from sgl_kernel.utils import is_arch_support_pdl
        from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
        from sglang.kernels.ops.attention.metadata import get_num_kv_splits_triton
    except (ImportError, OSError, RuntimeError) as error:
        raise peer_failed(SGLANG_TRITON, error) from error
    return decode_attention_fwd, get_num_kv_splits_triton, is_arch_support_pdl()


def peer_failed(kernel: str, error: BaseException) -> RunFailed:
    """The sentence that names a peer that cannot run."""
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return RunFailed(f"the peer {kernel} cannot run here ({type(error).__name__}: {first[:300]}): mend its "
                     "installation, or leave the peers out with kernels.peers=false.")


def require_peers() -> None:
    """Raises RunFailed if a peer cannot even be imported."""
    flashinfer_wrapper()
    sglang_triton_kernels()
