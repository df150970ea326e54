"""The plan of a decode step against plain Python, and what every plan must be."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtuner_triton.decode_plan import make_plan, plan_reference, plan_rows

LENGTHS = st.lists(st.one_of(st.integers(1, 300), st.sampled_from([1, 64, 65, 128, 20_000])), min_size=1, max_size=9)


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.integers(1, 60), st.sampled_from([64, 128]), st.integers(1, 5), st.randoms())
def test_a_plan_equals_the_reference_and_covers_every_page_once(device, lengths, wave, page, least, random):
    batch, rows = len(lengths), plan_rows(len(lengths), wave)
    seq_lens = torch.tensor(lengths, device=device)
    slots = torch.tensor(random.sample(range(batch + 3), batch), dtype=torch.int32, device=device)
    plan = torch.full((rows, 4), 77, dtype=torch.int32, device=device)
    spans = torch.full((batch, 2), 77, dtype=torch.int32, device=device)
    make_plan(seq_lens, slots, plan, spans, page, least)
    expected, expected_spans = plan_reference(seq_lens, slots, rows, page, least)
    used = expected[:, 0] >= 0
    assert torch.equal(plan.cpu()[used], expected[used])
    assert (plan.cpu()[~used, 0] == -1).all()
    assert torch.equal(spans.cpu(), expected_spans)

    read = [[] for _ in lengths]
    for request, _, first, last in expected[batch:].tolist():
        if request >= 0:
            read[request] += range(first, last)
    assert read == [list(range((n - 1) // page)) for n in lengths]
    sizes = [(expected[first:first + count, 3] - expected[first:first + count, 2]).tolist()
             for first, count in expected_spans.tolist()]
    assert all(max(mine) - min(mine) <= 1 for mine in sizes if mine)
    pages = [(n - 1) // page for n in lengths]
    smaller = max(map(max, filter(None, sizes)), default=1) - 1
    assert smaller < least or sum(-(-n // smaller) for n in pages) > rows - batch


def test_a_batch_that_fills_the_gpu_still_gets_chunks_of_fair_size(device):
    """One long request among many short ones must not be read by one program."""
    lengths = [64 * 512] + [130] * 199
    plan, spans = plan_reference(torch.tensor(lengths), torch.arange(200), plan_rows(200, 396), 64)
    assert (plan[:, 3] - plan[:, 2])[200:].max() <= 4
    assert spans[0, 1] >= 128
