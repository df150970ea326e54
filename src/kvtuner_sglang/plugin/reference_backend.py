"""Attention over packed pages in plain torch, on any device: the truth that faster backends are held to.

Visibility depends on position alone.  Per-token formats: a query reads every token, its own too, as stored.
Per-channel keys: a query at position t reads the pages before floor(t / page) as stored and its own page in full
precision.  Queries are computed in blocks of positions (a page, or 64 tokens), so that a prompt gives the same
matrix shapes however it was cut into chunks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from torch.nn.functional import scaled_dot_product_attention

from kvtuner_sglang.plugin.attention import noisy, pool_with_tails, refuse_unusual
from kvtuner_sglang.plugin.options import options_of
from kvtuner_sglang.plugin.pool import LayerPages
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

    def first(self, size: int) -> int:
        """Where the page in progress begins."""
        return self.start // size * size


@dataclass(frozen=True)
class PageList:
    """Pages of all requests of a batch, one request after the other: ids (n,) int64 and how many each has."""

    ids: torch.Tensor
    counts: tuple[int, ...]

    @staticmethod
    def of(parts: list[torch.Tensor], like: torch.Tensor) -> "PageList":
        ids = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=like.device)
        return PageList(ids, tuple(len(part) for part in parts))


class ReferenceBackend(AttentionBackend):
    """The attention backend `kvtuner` without fused kernels."""

    attention = "reference"

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        self.pool = pool = pool_with_tails(model_runner)
        self.page_size = pool.page_size
        self.block_tokens = pool.page_size if pool.page_size > 1 else QUERY_BLOCK_TOKENS
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.noise = options_of(model_runner.server_args).kvtuner_kv_noise
        self.spans: list[Span] = []
        self.everything = self.earlier = self.complete = PageList.of([], self.req_to_token)
        self.last_rows = torch.empty(0, dtype=torch.int64)

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
        self._list_pages()

    def _list_pages(self) -> None:
        """Which pages this pass reads and completes; the same in all layers.

        `everything`: for per-token layers.  `earlier`: all that a query of a per-channel layer can read as stored,
        which the last page never is.
        """
        size, spans = self.page_size, self.spans

        def pages(bounds: Callable[[Span], tuple[int, int]]) -> PageList:
            return PageList.of([self._pages(span.slot, *bounds(span)) for span in spans], self.req_to_token)

        self.everything = pages(lambda span: (0, span.end))
        self.earlier = pages(lambda span: (0, (span.end - 1) // size * size))
        self.complete = pages(lambda span: (span.first(size), span.end // size * size))
        rows = [row for span in spans for row in range(span.row + span.first(size) + size - 1 - span.start,
                                                       span.row + span.end - span.start, size)]
        self.last_rows = torch.tensor(rows, dtype=torch.int64, device=self.req_to_token.device)

    def forward_extend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any, forward_batch: Any,
                       save_kv_cache: bool = True, **_: Any) -> torch.Tensor:
        """q: (tokens, q_heads * head_dim), k, v: (tokens, kv_heads * head_dim) -> like q."""
        refuse_unusual(layer, k, save_kv_cache)
        pool = self.pool
        q = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        k = noisy(k.view(-1, pool.head_num, pool.head_dim), self.noise)
        v = noisy(v.view(-1, pool.head_num, pool.head_dim), self.noise)
        pages = pool.layer(layer.layer_id)
        if not pages.fmt.key.per_channel:
            locations = forward_batch.out_cache_loc
            page, offset = locations // self.page_size, locations % self.page_size
            reference.write_tokens(pages.key, page, offset, k)
            reference.write_tokens(pages.value, page, offset, v)
        out = torch.empty_like(q)
        read = self._read_as_stored if not pages.fmt.key.per_channel else self._complete_and_read
        for span, context in zip(self.spans, read(pages, q, k, v), strict=True):
            self._attend(q, out, span, context, layer.scaling)
        return out.view(out.shape[0], -1)

    forward_decode = forward_extend

    def support_triton(self) -> bool:
        return False

    def _pages(self, slot: int, start: int, end: int) -> torch.Tensor:
        """Pages of the request's positions start..end-1; start is a page boundary."""
        return self.req_to_token[slot, start : max(start, end) : self.page_size].long() // self.page_size

    def _stored(self, pages: LayerPages, which: PageList, dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
        """Keys and values (kv_heads, tokens, head_dim) of each request's pages as stored."""
        tokens = [count * self.page_size for count in which.counts]
        key, value = (reference.read_pages(store, which.ids, dtype).split(tokens, 1)
                      for store in (pages.key, pages.value))
        return list(zip(key, value, strict=True))

    def _read_as_stored(self, pages: LayerPages, _q: torch.Tensor, k: torch.Tensor,
                        _v: torch.Tensor) -> list["Context"]:
        return [_TokenContext(key, value) for key, value in self._stored(pages, self.everything, k.dtype)]

    def _complete_and_read(self, pages: LayerPages, q: torch.Tensor, k: torch.Tensor,
                           v: torch.Tensor) -> list["Context"]:
        """Store the pages that this pass completes, keep each request's tail, then read what its queries may see."""
        size = self.page_size
        tail_key, tail_value = pages.tails
        full = [(_with_tail(tail_key, k, span, size), _with_tail(tail_value, v, span, size)) for span in self.spans]
        if len(self.complete.ids):
            weight = reference.score_weights(q[self.last_rows], k.shape[1])
            for which, store in enumerate((pages.key, pages.value)):
                whole = torch.cat([full[i][which][: count * size] for i, count in enumerate(self.complete.counts)])
                reference.write_pages(store, self.complete.ids, whole.unflatten(0, (-1, size)).transpose(1, 2), weight)
        for span, (key, value) in zip(self.spans, full, strict=True):
            rest = span.end % size
            tail_key[span.slot, :rest] = key[len(key) - rest :]
            tail_value[span.slot, :rest] = value[len(value) - rest :]
        return [_PageContext(key, value, full_key.transpose(0, 1), full_value.transpose(0, 1), span.first(size), size)
                for span, (key, value), (full_key, full_value)
                in zip(self.spans, self._stored(pages, self.earlier, k.dtype), full, strict=True)]

    def _attend(self, q: torch.Tensor, out: torch.Tensor, span: Span, context: "Context", scaling: float) -> None:
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


@dataclass(frozen=True)
class _TokenContext:
    """Everything as stored, one's own token too: key, value (kv_heads, tokens, head_dim)."""

    key: torch.Tensor
    value: torch.Tensor

    def visible(self, _low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (kv_heads, high, head_dim) that queries at positions low..high-1 may read."""
        return self.key[:, :high], self.value[:, :high]


@dataclass(frozen=True)
class _PageContext:
    """Earlier pages as stored, the queries' own page in full precision, all (kv_heads, tokens, head_dim).

    key, value: as stored, from position 0; full_key, full_value: from position `first`, where a page begins.
    """

    key: torch.Tensor
    value: torch.Tensor
    full_key: torch.Tensor
    full_value: torch.Tensor
    first: int
    size: int

    def visible(self, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (kv_heads, high, head_dim) that queries at positions low..high-1, one page, may read."""
        own = low // self.size * self.size
        full = slice(own - self.first, high - self.first)
        return (torch.cat([self.key[:, :own], self.full_key[:, full]], 1),
                torch.cat([self.value[:, :own], self.full_value[:, full]], 1))


Context = _TokenContext | _PageContext


def _with_tail(tail: torch.Tensor, new: torch.Tensor, span: Span, size: int) -> torch.Tensor:
    """The page in progress and the new tokens: (end - first, kv_heads, head_dim)."""
    earlier = tail[span.slot, : span.start - span.first(size)]
    return torch.cat([earlier, new[span.rows]])
