"""SGLang's page allocator on a CPU: the same result as its Triton kernels, which need a GPU."""

from collections.abc import Callable
from typing import Any

import torch


def around_alloc_extend(original: Callable[..., torch.Tensor | None], allocator: Any, prefix_lens: torch.Tensor,
                        prefix_lens_cpu: torch.Tensor, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor,
                        last_loc: torch.Tensor, extend_num_tokens: int,
                        num_new_pages: int | None = None) -> torch.Tensor | None:
    """Locations of all new tokens, (extend_num_tokens,) int64, or None when the pages do not suffice."""
    if not _on_cpu(allocator):
        return original(allocator, prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, last_loc, extend_num_tokens,
                        num_new_pages)
    from sglang.srt.mem_cache.allocator.paged import alloc_extend_naive

    size = allocator.page_size
    needed = int(((seq_lens_cpu + size - 1) // size - (prefix_lens_cpu + size - 1) // size).sum())
    if needed > len(allocator.free_pages):
        return None
    out = torch.empty(extend_num_tokens, dtype=torch.int64)
    alloc_extend_naive(prefix_lens, seq_lens, last_loc, allocator.free_pages, out, size, "cpu")
    allocator.free_pages = allocator.free_pages[needed:]
    return out


def around_alloc_decode(original: Callable[..., torch.Tensor | None], allocator: Any, seq_lens: torch.Tensor,
                        seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor) -> torch.Tensor | None:
    """Locations of one new token a request, (requests,) int64, or None when the pages do not suffice."""
    if not _on_cpu(allocator):
        return original(allocator, seq_lens, seq_lens_cpu, last_loc)
    opens_page = (seq_lens - 1) % allocator.page_size == 0
    needed = int(opens_page.sum())
    if needed > len(allocator.free_pages):
        return None
    out = last_loc.long() + 1
    out[opens_page] = allocator.free_pages[:needed] * allocator.page_size
    allocator.free_pages = allocator.free_pages[needed:]
    return out


def around_get_last_loc(original: Callable[..., torch.Tensor], req_to_token: torch.Tensor, slots: torch.Tensor,
                        prefix_lens: torch.Tensor) -> torch.Tensor:
    """The location of each request's last cached token, -1 where there is none."""
    if req_to_token.device.type != "cpu":
        return original(req_to_token, slots, prefix_lens)
    from sglang.srt.mem_cache.allocation import get_last_loc_torch

    return get_last_loc_torch(req_to_token, slots, prefix_lens)


def _on_cpu(allocator: Any) -> bool:
    return torch.device(allocator.device).type == "cpu"
