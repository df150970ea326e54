"""A decode step in a CUDA graph: replayed with other lengths, slots and pages it computes what it would without."""

import pytest
import torch

from kvtuner_triton.decode import DecodeWorkspace, PackedPages, decode_attention, default_tuning
from kvtuner_triton.decode_case import attend, random_case, relative_error
from kvtuner_triton.store import store_decode

pytestmark = pytest.mark.gpu
SHAPE = {"q_heads": 14, "kv_heads": 2, "head_dim": 128, "page": 64, "key_bits": 4, "value_bits": 4,
         "symmetric": (False, True), "boosted": True}


def stored(case):
    return case.keys.codes, case.keys.meta, case.keys.extra, case.values.codes, case.values.meta


def bits(*tensors):
    """Copies to compare bit for bit: NaN, too, equals itself."""
    return [x.contiguous().view(torch.uint8).clone() for x in tensors]


def test_replays_with_other_lengths_slots_and_pages(device):
    cases = [random_case(lengths, **SHAPE, seed=i, device=device)
             for i, lengths in enumerate(([64, 900, 65, 1], [1000, 64, 128, 2], [1, 1, 1, 1]))]
    first = cases[0]
    rows = max(c.req_to_token.shape[1] for c in cases)
    pages = max(len(c.keys.codes) for c in cases)  # and one more for each request that completes one
    slots, seq_lens = first.slots.clone(), first.seq_lens.clone()
    table = torch.zeros(6, rows, dtype=torch.int32, device=device)
    buffers = [torch.zeros(pages + 4, *x.shape[1:], dtype=x.dtype, device=device)
               for x in stored(first)]
    keys, values = PackedPages(4, *buffers[:3]), PackedPages(4, *buffers[3:])
    q, tail_key, tail_value = (x.clone() for x in (first.q, first.tail_key, first.tail_value))
    new_key, new_value = (torch.zeros(4, 2, 128, dtype=q.dtype, device=device) for _ in range(2))
    out = torch.empty_like(q)
    work = DecodeWorkspace(4, 14, 2, 128, 64, device, default_tuning(4, 4))

    def load(case):
        """Put the case into the graph's buffers, but the newest token's key and value where new ones come from."""
        slots.copy_(case.slots)
        seq_lens.copy_(case.seq_lens)
        q.copy_(case.q)
        table[:, :case.req_to_token.shape[1]] = case.req_to_token
        for buffer, x in zip(buffers, stored(case), strict=True):
            buffer[:len(x)] = x
            buffer[len(x):] = 0
        last = (case.seq_lens - 1) % 64
        for tail, source, new in ((tail_key, case.tail_key, new_key), (tail_value, case.tail_value, new_value)):
            tail.copy_(source)
            new.copy_(source[case.slots, last])
            tail[case.slots, last] = float("nan")
        # A page completed in this step is written where nothing reads: to a page of the request's own.
        for b in ((case.seq_lens % 64) == 0).nonzero().flatten().tolist():
            slot, end, place = int(case.slots[b]), int(case.seq_lens[b]), (pages + b) * 64
            table[slot, end - 64:end] = torch.arange(place, place + 64, device=device, dtype=torch.int32)
        out.fill_(float("nan"))

    def step():
        work.plan(seq_lens, slots)
        store_decode(new_key, new_value, keys, values, tail_key, tail_value, table, slots, seq_lens, q)
        decode_attention(work, q, keys, values, tail_key, tail_value, table, first.sm_scale, out)

    load(first)
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for case in (*cases[1:], first):
        load(case)
        graph.replay()
        replayed, left = out.clone(), bits(*buffers, tail_key, tail_value)
        load(case)
        step()
        assert torch.equal(replayed, out)
        assert all(map(torch.equal, left, bits(*buffers, tail_key, tail_value)))
        for b, end in enumerate(case.seq_lens.tolist()):
            assert [bool(x[pages + b].any()) for x in buffers] == [end % 64 == 0] * 5
        truth = attend(case, torch.float64)
        assert relative_error(out, truth) <= 2 * relative_error(attend(case, torch.bfloat16), truth)
