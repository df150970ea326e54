"""Attention over packed pages in plain torch, on any device: the truth that faster backends are held to.

Visibility depends on position alone.  Per-token formats: a query reads every token, its own too, as stored.
Per-channel keys: a query at position t reads the pages before floor(t / page) as stored and its own page in full
precision.  Queries are computed in blocks of positions (a page, or 64 tokens), so that a prompt gives the same
matrix shapes however it was cut into chunks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from torch.nn.functional import scaled_dot_product_attention

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.plugin.options import options_of
from kvtuner_sglang.plugin.pool import LayerPages, PackedKVPool
from kvtuner_triton import reference

QUERY_BLOCK_TOKENS = 64


@dataclass(frozen=True)
class Span:
    """New tokens of one request in this forward pass: positions start..end-1, rows row..row+end-start of q, k, v."""

    slot: int
    start: int
    end: int
    row: int

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.end - self.start)


class ReferenceBackend(AttentionBackend):
    """The attention backend `kvtuner` without fused kernels."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        pool = model_runner.token_to_kv_pool
        if not isinstance(pool, PackedKVPool):
            raise ConfigError(f"attention backend kvtuner found the pool {type(pool).__name__}, not PackedKVPool: "
                              "reinstall kvtuner-sglang with the SGLang version it names.")
        self.pool = pool
        self.page_size = pool.page_size
        self.block_tokens = pool.page_size if pool.page_size > 1 else QUERY_BLOCK_TOKENS
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        pool.create_tails(self.req_to_token.shape[0])
        self.noise = options_of(model_runner.server_args).kvtuner_kv_noise
        self.spans: list[Span] = []

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Turn the batch into spans once for all layers."""
        ends = forward_batch.seq_lens.tolist()
        slots = forward_batch.req_pool_indices.tolist()
        if forward_batch.forward_mode.is_decode_or_idle():
            starts = [end - 1 for end in ends]
        else:
            starts = forward_batch.extend_prefix_lens.tolist()
        self.spans, row = [], 0
        for slot, start, end in zip(slots, starts, ends, strict=True):
            self.spans.append(Span(slot, start, end, row))
            row += end - start

    def forward_extend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any, forward_batch: Any,
                       save_kv_cache: bool = True, **_: Any) -> torch.Tensor:
        """q: (tokens, q_heads * head_dim), k, v: (tokens, kv_heads * head_dim) -> like q."""
        _refuse_unusual(layer, k, save_kv_cache)
        pool = self.pool
        q = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        k = self._noisy(k.view(-1, pool.head_num, pool.head_dim))
        v = self._noisy(v.view(-1, pool.head_num, pool.head_dim))
        pages = pool.layer(layer.layer_id)
        if not pages.fmt.key.per_channel:
            locations = forward_batch.out_cache_loc
            page, offset = locations // self.page_size, locations % self.page_size
            reference.write_tokens(pages.key, page, offset, k)
            reference.write_tokens(pages.value, page, offset, v)
        out = torch.empty_like(q)
        for span in self.spans:
            context = (_PageContext if pages.fmt.key.per_channel else _TokenContext)(self, pages, span, q, k, v)
            self._attend(q, out, span, context, layer.scaling)
        return out.view(out.shape[0], -1)

    forward_decode = forward_extend

    def support_triton(self) -> bool:
        return False

    def page_ids(self, slot: int, start: int, end: int) -> torch.Tensor:
        """Pages of the request's positions start..end-1; start is a page boundary."""
        return self.req_to_token[slot, start:end:self.page_size].long() // self.page_size

    def _attend(self, q: torch.Tensor, out: torch.Tensor, span: Span, context: Any, scaling: float) -> None:
        low = span.start
        while low < span.end:
            high = min(span.end, (low // self.block_tokens + 1) * self.block_tokens)
            rows = slice(span.row + low - span.start, span.row + high - span.start)
            key, value = context.visible(low, high)
            mask = None
            if high - low > 1:
                mask = torch.arange(high, device=q.device) <= torch.arange(low, high, device=q.device)[:, None]
            block = scaled_dot_product_attention(
                q[rows].transpose(0, 1)[None], key[None], value[None], attn_mask=mask, scale=scaling, enable_gqa=True
            )
            out[rows] = block[0].transpose(0, 1)
            low = high

    def _noisy(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + self.noise * torch.randn_like(x)) if self.noise else x


class _TokenContext:
    """Everything as stored, one's own token too."""

    def __init__(self, backend: ReferenceBackend, pages: LayerPages, span: Span, _q: torch.Tensor, k: torch.Tensor,
                 _v: torch.Tensor) -> None:
        ids = backend.page_ids(span.slot, 0, span.end)
        self.key = reference.read_pages(pages.key, ids, k.dtype)
        self.value = reference.read_pages(pages.value, ids, k.dtype)

    def visible(self, _low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (kv_heads, high, head_dim) that queries at positions low..high-1 may read."""
        return self.key[:, :high], self.value[:, :high]


class _PageContext:
    """Earlier pages as stored, the queries' own page in full precision; completes pages and keeps the tail."""

    def __init__(self, backend: ReferenceBackend, pages: LayerPages, span: Span, q: torch.Tensor, k: torch.Tensor,
                 v: torch.Tensor) -> None:
        self.size = size = backend.page_size
        self.first = span.start // size * size
        self.full_key = _with_tail(pages.tail_key, k, span, self.first)
        self.full_value = _with_tail(pages.tail_value, v, span, self.first)
        self._complete_pages(backend, pages, span, q)
        readable = (span.end - 1) // size * size  # no query reads the last page as stored
        ids = backend.page_ids(span.slot, 0, readable)
        self.key = reference.read_pages(pages.key, ids, k.dtype)
        self.value = reference.read_pages(pages.value, ids, k.dtype)

    def _complete_pages(self, backend: ReferenceBackend, pages: LayerPages, span: Span, q: torch.Tensor) -> None:
        size = self.size
        boundary = span.end // size * size
        count = (boundary - self.first) // size
        if count:
            ids = backend.page_ids(span.slot, self.first, boundary)
            last_rows = slice(span.row + self.first + size - 1 - span.start, span.row + boundary - span.start, size)
            weight = reference.score_weights(q[last_rows], self.full_key.shape[0])
            for store, full in ((pages.key, self.full_key), (pages.value, self.full_value)):
                whole = full[:, : count * size].unflatten(1, (count, size)).transpose(0, 1)
                reference.write_pages(store, ids, whole, weight)
        rest = span.end - boundary
        for tail, full in ((pages.tail_key, self.full_key), (pages.tail_value, self.full_value)):
            tail[span.slot, :rest] = full[:, full.shape[1] - rest :].transpose(0, 1)

    def visible(self, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (kv_heads, high, head_dim) that queries at positions low..high-1, one page, may read."""
        own = low // self.size * self.size
        full = slice(own - self.first, high - self.first)
        return (torch.cat([self.key[:, :own], self.full_key[:, full]], 1),
                torch.cat([self.value[:, :own], self.full_value[:, full]], 1))


def _with_tail(tail: torch.Tensor, new: torch.Tensor, span: Span, first: int) -> torch.Tensor:
    """The page in progress and the new tokens: (kv_heads, end - first, head_dim)."""
    earlier = tail[span.slot, : span.start - first]
    return torch.cat([earlier, new[span.rows]]).transpose(0, 1)


def _refuse_unusual(layer: Any, k: torch.Tensor | None, save_kv_cache: bool) -> None:
    unusual = {
        "cross attention": layer.is_cross_attention,
        "a sliding window": (layer.sliding_window_size or -1) > -1,
        "logit soft-capping": bool(layer.logit_cap),
        "keys written around the backend": k is None or not save_kv_cache,
    }
    for name, present in unusual.items():
        if present:
            raise ConfigError(f"layer {layer.layer_id} uses {name}, which packed KV pages do not support: "
                              "give --enable-kvtuner-quant=False.")
