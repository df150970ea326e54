"""The tables of one extend pass, made once for all layers, without waiting for the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvtuner_triton.prefix import PrefixTuning, prefix_tables
from kvtuner_triton.store import extend_items
from kvtuner_triton.unpack import BLOCK, stored_tokens, unpack_blocks

SCRATCH_TOKENS = 1 << 16  # dequantized at once, or more if a request may be longer


@dataclass(frozen=True)
class ScratchGroup:
    """Requests whose stored tokens are dequantized together: tables of unpack.py and prefix.py, on the device."""

    blocks: torch.Tensor
    requests: torch.Tensor
    tiles: torch.Tensor


@dataclass(frozen=True)
class ExtendPass:
    """Who has how many new tokens where, as store.py takes it; `tokens` in all, without padding.

    before, after: what is stored before and after attention.
    """

    tokens: int
    slots: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    groups: tuple[ScratchGroup, ...]


def plan_extend(forward_batch: Any, page: int | None, tuning: PrefixTuning, scratch_tokens: int) -> ExtendPass:
    """page: of per-channel keys; None for per-token formats, which read every token as stored."""
    starts = np.asarray(forward_batch.extend_prefix_lens_cpu, dtype=np.int64)
    new = np.asarray(forward_batch.extend_seq_lens_cpu, dtype=np.int64)
    ends, device = starts + new, forward_batch.req_pool_indices.device
    slots = forward_batch.req_pool_indices[: len(new)]
    rows = np.cumsum(new) - new
    stored = stored_tokens(ends.tolist(), page)
    groups = []
    for part in scratch_groups(stored.tolist(), scratch_tokens):
        # Slots are known on the device alone, so tables number the requests first.
        numbers = list(range(part.start, part.stop))
        requests, tiles = prefix_tables(numbers, starts[part].tolist(), ends[part].tolist(), stored[part].tolist(),
                                        tuning.tokens)
        requests[:, 3] += int(rows[part.start])
        blocks = unpack_blocks(numbers, stored[part].tolist(), page or BLOCK)
        groups.append(ScratchGroup(_with_slots(blocks, slots), _with_slots(requests, slots), _on(tiles, device)))
    items = extend_items(ends.tolist(), new.tolist(), page) if page else 2 * (torch.empty((0, 5), dtype=torch.int32),)
    return ExtendPass(int(new.sum()), slots, _on(items[0], device), _on(items[1], device), tuple(groups))


def scratch_groups(stored: Sequence[int], limit: int) -> list[slice]:
    """Neighbouring requests that have at most `limit` stored tokens together, as each has alone."""
    groups, start, total = [], 0, 0
    for b, count in enumerate(stored):
        if b > start and total + count > limit:
            groups.append(slice(start, b))
            start, total = b, 0
        total += count
    return [*groups, slice(start, len(stored))]


def _with_slots(table: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Replace request numbers in the first column by the requests' slots."""
    table = _on(table, slots.device)
    table[:, 0] = slots[table[:, 0].long()].to(torch.int32)
    return table


def _on(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
