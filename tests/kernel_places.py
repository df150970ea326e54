"""Where a case of the kernels' tests lies in its buffers: at the beginning, or so far in that 32-bit offsets wrap."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvtuner_triton.decode import PackedPages

PAGE, KV_HEADS, HEAD_DIM = 64, 2, 128
NEAR = 5
FAR = 2**31 // (PAGE * KV_HEADS * HEAD_DIM)  # so many pages of 8-bit codes, or slots' tails, have 2^31 elements


@pytest.fixture(params=[pytest.param(NEAR, id="near"), pytest.param(FAR, id="beyond_2_31", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many pages and slots are before those of the case; the far ones take 13 GiB, given back at once."""
    yield request.param
    torch.cuda.empty_cache()


def moved(case: Any, place: int) -> Any:
    """The same case with `place` pages of zeros before its pages and as many slots before its slots.

    case: any of the kernels', with pages of PAGE tokens, KV_HEADS and HEAD_DIM.
    """
    changed = {"keys": behind(case.keys, place), "values": behind(case.values, place),
               "req_to_token": behind(case.req_to_token + place * PAGE, place),
               "slots": [slot + place for slot in case.slots] if isinstance(case.slots, list) else case.slots + place}
    for name in ("tail_key", "tail_value"):
        if getattr(case, name, None) is not None:
            changed[name] = behind(getattr(case, name), place)
    return replace(case, **changed)


def behind(x: Any, place: int) -> Any:
    """Pages, or a tensor, behind `place` rows of zeros."""
    if isinstance(x, PackedPages):
        codes, meta = behind(x.codes, place), behind(x.meta, place)
        return replace(x, codes=codes, meta=meta, extra=None if x.extra is None else behind(x.extra, place))
    whole = torch.zeros((place + len(x), *x.shape[1:]), dtype=x.dtype, device=x.device)
    whole[place:] = x
    return whole


def require_written(whole: torch.Tensor, rows: torch.Tensor) -> None:
    """The last rows are bit for bit these, which may be on the CPU, and those before them still zeros."""
    before, last = whole[:len(whole) - len(rows)], whole[len(whole) - len(rows):]
    assert torch.equal(last.cpu().contiguous().view(torch.uint8), rows.cpu().contiguous().view(torch.uint8))
    assert not any(part.any() for part in before.split(4096))
