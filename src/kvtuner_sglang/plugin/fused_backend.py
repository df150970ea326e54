"""Attention over packed pages by the kernels of kvtuner_triton: the backend `kvtuner` on a GPU.

Decode: one launch stores the new token (and the page it completes), one attends, one merges; work is divided once a
step for all layers of a kind (layer_kinds.py).  Grids depend on the batch size alone, so a CUDA graph holds the whole
step; padded requests have slot 0, which no request owns, and length 1, and write to tail 0.
Extend: store, dequantize what queries may read as stored, attend; a few tails are kept afterwards (store.py).

The kernels read req_to_token while they run, a replayed graph too.  SGLang takes its backends to have read it before a
replay starts, and would let the scheduler give a slot to the next request meanwhile; a finished request's last step
could then complete a page that is not its own.  So the scheduler is made to wait for the whole step.
"""

import logging
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.runtime_context import get_parallel

from kvtuner_sglang.plugin.attention import noisy, pool_with_tails, refuse_unusual
from kvtuner_sglang.plugin.extend_pass import SCRATCH_TOKENS, ExtendPass, plan_extend
from kvtuner_sglang.plugin.layer_kinds import FusedLayer, LayerKind, fused_layer
from kvtuner_sglang.plugin.options import options_of
from kvtuner_triton import decode_token
from kvtuner_triton.decode import DecodeWorkspace, decode_attention
from kvtuner_triton.prefix import prefix_attention, prefix_tuning
from kvtuner_triton.store import store_decode, store_extend
from kvtuner_triton.store_token import store_by_location
from kvtuner_triton.unpack import unpack_by_location, unpack_pages

logger = logging.getLogger(__name__)

EAGER_BATCH = 64  # buffers for steps without a graph hold so many requests, or as many as come


class FusedBackend(AttentionBackend):
    """The attention backend `kvtuner` by fused kernels, each layer in its own format."""

    steps: dict[LayerKind, DecodeWorkspace]  # of the pass that runs, if it decodes
    extends: dict[int | None, ExtendPass]  # of the pass that runs, if it extends, by LayerKind.page

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        self.pool = pool_with_tails(model_runner)
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.noise = options_of(model_runner.server_args).kvtuner_kv_noise
        self.q_heads = model_runner.model_config.num_attention_heads // get_parallel().attn_tp_size
        envs.SGLANG_FORCE_COARSE_WAR_BARRIER.set(True)
        self.layers = [fused_layer(layer.fmt, layer.key, layer.value) for layer in self.pool.layers]
        self.kinds = tuple(dict.fromkeys(layer.kind for layer in self.layers))
        self.prefix_tunings = {kind.page: prefix_tuning(self.q_heads // self.pool.head_num, kind.page, self.pool.dtype)
                               for kind in self.kinds}
        # Taken at the start, so that a long prompt cannot run out of memory later.
        rows = min(max(SCRATCH_TOKENS, self.req_to_token.shape[1]), self.pool.size)  # one request fits
        scratch = (2, rows, self.pool.head_num, self.pool.head_dim)
        self.scratch = torch.empty(scratch, dtype=self.pool.dtype, device=self.pool.device)
        self.largest: dict[LayerKind, DecodeWorkspace] = {}
        self.workspaces: dict[tuple[LayerKind, int], DecodeWorkspace] = {}
        if self.attention != "fused":
            logger.warning("kvtuner: decode attention runs in plain Triton, several times slower: the tensor-core "
                           "kernel is for 16-bit models and at most 8 query heads a kv head.")

    @property
    def attention(self) -> str:
        """What /server_info and records say."""
        by_page = [kind for kind in self.kinds if kind.page]
        portable = any(self._workspace(kind, 1).portable or self.pool.dtype == torch.float32 for kind in by_page)
        return "fused, portable decode" if portable else "fused"

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Graphs keep the buffers' addresses, so they are made once, for the largest batch."""
        for kind in self.kinds:
            self._workspace(kind, max_bs)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """What the host does once a pass: nothing for decoding, tables for an extend."""
        if forward_batch.forward_mode.is_decode_or_idle():
            self.steps = {kind: self._workspace(kind, forward_batch.batch_size) for kind in self.kinds}
        else:
            self.extends = {page: plan_extend(forward_batch, page, tuning, self.scratch.shape[1])
                            for page, tuning in self.prefix_tunings.items()}

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Divide a decode step's work, once for all layers of a kind; recorded in the graph."""
        if forward_batch.forward_mode.is_decode_or_idle():
            for step in self.steps.values():
                step.plan(forward_batch.seq_lens, forward_batch.req_pool_indices)

    def forward_decode(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any, forward_batch: Any,
                       save_kv_cache: bool = True, **_: Any) -> torch.Tensor:
        """q: (batch, q_heads * head_dim), k, v: (batch, kv_heads * head_dim) -> like q."""
        q, k, v, mine = self._inputs(q, k, v, layer, save_kv_cache)
        out, keys, values, step = torch.empty_like(q), mine.keys, mine.values, self.steps[mine.kind]
        if mine.kind.page:
            tails = self.pool.layer(layer.layer_id).tails
            slots, seq_lens = forward_batch.req_pool_indices, forward_batch.seq_lens
            store_decode(k, v, keys, values, *tails, self.req_to_token, slots, seq_lens, q)
            decode_attention(step, q, keys, values, *tails, self.req_to_token, layer.scaling, out)
        else:
            store_by_location(k, v, keys, values, forward_batch.out_cache_loc)
            decode_token.decode_token_attention(step, q, keys, values, self.req_to_token, layer.scaling, out)
        return out.flatten(1)

    def forward_extend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any, forward_batch: Any,
                       save_kv_cache: bool = True, **_: Any) -> torch.Tensor:
        """q: (tokens, q_heads * head_dim), k, v: (tokens, kv_heads * head_dim) -> like q."""
        q, k, v, mine = self._inputs(q, k, v, layer, save_kv_cache)
        out, now = torch.empty_like(q), self.extends[mine.kind.page]
        if not mine.kind.page:
            store_by_location(k[: now.tokens], v[: now.tokens], mine.keys, mine.values, forward_batch.out_cache_loc)
            self._attend(q, k, v, mine, layer.scaling, out, (None, None))
            return out.flatten(1)
        tails = self.pool.layer(layer.layer_id).tails
        where = (*tails, self.req_to_token, now.slots)
        store_extend(k, v, mine.keys, mine.values, *where, now.before, q)
        self._attend(q, k, v, mine, layer.scaling, out, tails)
        store_extend(k, v, mine.keys, mine.values, *where, now.after, q)
        return out.flatten(1)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mine: FusedLayer, scaling: float,
                out: torch.Tensor, tails: tuple[torch.Tensor | None, torch.Tensor | None]) -> None:
        """Attention of an extend over what is stored, dequantized group by group, and, with tails, its own pages."""
        unpack = unpack_pages if mine.kind.page else unpack_by_location
        key, value = self.scratch
        for group in self.extends[mine.kind.page].groups:
            unpack(mine.keys, mine.values, self.req_to_token, group.blocks, key, value)
            prefix_attention(q, k, v, *tails, key, value, group.requests, group.tiles, scaling, out,
                             self.prefix_tunings[mine.kind.page])

    def support_triton(self) -> bool:
        return True

    def _workspace(self, kind: LayerKind, batch: int) -> DecodeWorkspace:
        """The workspace of a batch size; larger ones than the buffers' take buffers of their own."""
        work = self.workspaces.get((kind, batch))
        if work is None:
            shape = (self.q_heads, self.pool.head_num, self.pool.head_dim, kind.unit, self.pool.device, kind.tuning)
            if kind not in self.largest or self.largest[kind].batch < batch:
                self.largest[kind] = DecodeWorkspace(max(batch, EAGER_BATCH), *shape)
            work = DecodeWorkspace(batch, *shape, buffers=self.largest[kind].buffers)
            self.workspaces[kind, batch] = work
        return work

    def _inputs(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any,
                save_kv_cache: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, FusedLayer]:
        refuse_unusual(layer, k, save_kv_cache)
        pool = self.pool
        k = noisy(k.view(-1, pool.head_num, pool.head_dim), self.noise)
        v = noisy(v.view(-1, pool.head_num, pool.head_dim), self.noise)
        return (q.reshape(-1, self.q_heads, pool.head_dim).contiguous(), k, v,
                self.layers[layer.layer_id - pool.start_layer])
