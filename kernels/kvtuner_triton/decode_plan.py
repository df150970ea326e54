"""Who reads which pages in one decode step: a list of equal chunks, made on the device once a step for all layers.

Request b with seq_len tokens has n_b = (seq_len - 1) // page stored pages and 1 + (seq_len - 1) % page tokens in its
page in progress.  A plan has a fixed number of rows, one program per row and kv head: `batch` rows for the pages in
progress, and the rest for chunks.  The chunk size C is the smallest, from `least` pages up, whose chunks all find a
row: sum_b ceil(n_b / C) <= rows - batch.  Each request's pages are then dealt evenly among its chunks.  Nothing is
read back to the host, so a CUDA graph can hold it.

All rows should run at once: a few programs left over for a second wave cost almost as much as the first (measured: up
to 30 % of the step).  So `plan_rows` gives as many rows as the GPU has room for, unless the batch is too large.

    plan    (rows, 4) int32: request, slot, first, last
            row b < batch: the page in progress of request b; first = n_b, last = its tokens
            row batch + i: chunk i, pages first .. last - 1; unused rows have request = -1
    spans   (batch, 2) int32: row of the request's first chunk, number of its chunks
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["batch", "limit", "least"])
def plan_kernel(seq_lens, slots, plan, spans, batch, limit, least, PAGE: tl.constexpr, BATCH: tl.constexpr,
                ROWS: tl.constexpr):
    """Program b writes the rows of request b; program 0 also marks the unused ones. `limit` is rows - batch."""
    b = tl.program_id(0)
    request = tl.arange(0, BATCH)
    inside = request < batch
    stored = (tl.load(seq_lens + request, mask=inside, other=1).to(tl.int32) - 1) // PAGE
    stored = tl.maximum(stored, 0)
    size = tl.maximum(least, (tl.sum(stored) + limit - 1) // limit)
    high = tl.maximum(size, tl.max(stored))
    while size < high:  # bisect: larger chunks are never more
        middle = (size + high) // 2
        fits = tl.sum((stored + middle - 1) // middle) <= limit
        high = tl.where(fits, middle, high)
        size = tl.where(fits, size, middle + 1)
    chunks = (stored + size - 1) // size
    before = tl.sum(tl.where(request < b, chunks, 0))
    total = tl.sum(chunks)
    mine = tl.sum(tl.where(request == b, chunks, 0))
    pages = tl.sum(tl.where(request == b, stored, 0))
    slot = tl.load(slots + b).to(tl.int32)
    length = tl.maximum(tl.load(seq_lens + b).to(tl.int32), 1)

    tl.store(plan + b * 4, b)
    tl.store(plan + b * 4 + 1, slot)
    tl.store(plan + b * 4 + 2, pages)
    tl.store(plan + b * 4 + 3, (length - 1) % PAGE + 1)
    tl.store(spans + b * 2, batch + before)
    tl.store(spans + b * 2 + 1, mine)
    for start in range(0, mine, ROWS):
        i = start + tl.arange(0, ROWS)
        row = plan + (batch + before + i) * 4
        tl.store(row, b, mask=i < mine)
        tl.store(row + 1, slot, mask=i < mine)
        tl.store(row + 2, i * pages // mine, mask=i < mine)
        tl.store(row + 3, (i + 1) * pages // mine, mask=i < mine)
    if b == 0:
        for start in range(total, limit, ROWS):
            i = start + tl.arange(0, ROWS)
            tl.store(plan + (batch + i) * 4, -1, mask=i < limit)


def plan_rows(batch: int, wave: int) -> int:
    """Rows of a plan where `wave` rows run at once: the wave, or, if `batch` fills it, enough for several waves."""
    return wave if wave >= 3 * batch else 2 * batch + wave


def make_plan(seq_lens: torch.Tensor, slots: torch.Tensor, plan: torch.Tensor, spans: torch.Tensor, page: int,
              least: int = 1) -> None:
    """Fill plan (rows, 4) and spans (batch, 2), both int32, from seq_lens and slots, (batch,) of any integer type.

    rows must be at least 2 * batch, so that the largest chunks, whole requests, find a row.
    """
    batch, block = seq_lens.shape[0], triton.next_power_of_2(seq_lens.shape[0])
    plan_kernel[(batch,)](seq_lens, slots, plan, spans, batch, plan.shape[0] - batch, least, PAGE=page, BATCH=block,
                          ROWS=128, num_warps=1 if block <= 128 else 4)


def plan_reference(seq_lens: torch.Tensor, slots: torch.Tensor, rows: int, page: int,
                   least: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain Python: plan (rows, 4), spans (batch, 2)."""
    lengths, batch = seq_lens.tolist(), len(seq_lens)
    stored = [(max(n, 1) - 1) // page for n in lengths]
    size = least
    while sum(-(-n // size) for n in stored) > rows - batch:
        size += 1
    plan = [[b, slot, stored[b], (max(n, 1) - 1) % page + 1]
            for b, (slot, n) in enumerate(zip(slots.tolist(), lengths, strict=True))]
    spans = []
    for b, pages in enumerate(stored):
        chunks = -(-pages // size)
        spans.append([len(plan), chunks])
        plan += [[b, plan[b][1], i * pages // chunks, (i + 1) * pages // chunks] for i in range(chunks)]
    plan += [[-1, 0, 0, 0]] * (rows - len(plan))
    return torch.tensor(plan, dtype=torch.int32), torch.tensor(spans, dtype=torch.int32)
