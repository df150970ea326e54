"""Who reads which pages in one decode step: a list of equal chunks, made on the device once a step for all layers.

Request b with seq_len tokens has n_b = (seq_len - 1) // page stored pages and 1 + (seq_len - 1) % page tokens in its
page in progress.  With `target` chunks wanted over the whole batch, a chunk has at most C = max(least, ceil(sum n_b /
target)) pages, request b gets k_b = ceil(n_b / C) chunks, and its pages are dealt evenly among them.  Then sum k_b <=
target + batch, whatever the lengths: the grid is fixed, nothing is read back to the host, and a CUDA graph can hold it.

    plan    (batch + target + batch, 4) int32: request, slot, first, last
            row b < batch: the page in progress of request b; first = 0, last = its tokens
            row batch + i: chunk i, pages first .. last - 1; unused rows have request = -1
    spans   (batch, 2) int32: row of the request's first chunk, number of its chunks
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["batch", "target", "least"])
def plan_kernel(seq_lens, slots, plan, spans, batch, target, least, PAGE: tl.constexpr, BATCH: tl.constexpr,
                ROWS: tl.constexpr):
    """Program b writes the rows of request b; program 0 also marks the unused ones."""
    b = tl.program_id(0)
    request = tl.arange(0, BATCH)
    inside = request < batch
    stored = (tl.load(seq_lens + request, mask=inside, other=1).to(tl.int32) - 1) // PAGE
    stored = tl.maximum(stored, 0)
    size = tl.maximum(least, (tl.sum(stored) + target - 1) // target)
    chunks = (stored + size - 1) // size
    before = tl.sum(tl.where(request < b, chunks, 0))
    total = tl.sum(chunks)
    mine = tl.sum(tl.where(request == b, chunks, 0))
    pages = tl.sum(tl.where(request == b, stored, 0))
    slot = tl.load(slots + b).to(tl.int32)
    length = tl.maximum(tl.load(seq_lens + b).to(tl.int32), 1)

    tl.store(plan + b * 4, b)
    tl.store(plan + b * 4 + 1, slot)
    tl.store(plan + b * 4 + 2, 0)
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
        for start in range(total, target + batch, ROWS):
            i = start + tl.arange(0, ROWS)
            tl.store(plan + (batch + i) * 4, -1, mask=i < target + batch)


def plan_rows(batch: int, target: int) -> int:
    """Rows a plan needs: one a request for its page in progress, and the most chunks there can be."""
    return 2 * batch + target


def make_plan(seq_lens: torch.Tensor, slots: torch.Tensor, plan: torch.Tensor, spans: torch.Tensor, page: int,
              least: int = 1) -> None:
    """Fill plan (rows, 4) and spans (batch, 2), both int32, from seq_lens and slots, (batch,) of any integer type."""
    batch = seq_lens.shape[0]
    target = plan.shape[0] - 2 * batch
    plan_kernel[(batch,)](seq_lens, slots, plan, spans, batch, target, least, PAGE=page,
                          BATCH=triton.next_power_of_2(batch), ROWS=128)


def plan_reference(seq_lens: torch.Tensor, slots: torch.Tensor, target: int, page: int,
                   least: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain Python: plan (2 * batch + target, 4), spans (batch, 2)."""
    lengths, batch = seq_lens.tolist(), len(seq_lens)
    stored = [(max(n, 1) - 1) // page for n in lengths]
    size = max(least, -(-sum(stored) // target))
    rows = [[b, slot, 0, (max(n, 1) - 1) % page + 1]
            for b, (slot, n) in enumerate(zip(slots.tolist(), lengths, strict=True))]
    spans = []
    for b, pages in enumerate(stored):
        chunks = -(-pages // size)
        spans.append([len(rows), chunks])
        rows += [[b, rows[b][1], i * pages // chunks, (i + 1) * pages // chunks] for i in range(chunks)]
    rows += [[-1, 0, 0, 0]] * (2 * batch + target - len(rows))
    return torch.tensor(rows, dtype=torch.int32), torch.tensor(spans, dtype=torch.int32)
