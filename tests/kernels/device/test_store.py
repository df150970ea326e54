"""Stores equal the CPU reference bit for bit: codes, metadata and tails, and nothing else is touched."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_places import HEAD_DIM, KV_HEADS, PAGE, behind, moved, require_written
from kvtuner_sglang.quant import TensorFormat
from kvtuner_triton import reference
from kvtuner_triton.decode import PackedPages
from kvtuner_triton.layout import boost_slots
from kvtuner_triton.store import store_decode
from kvtuner_triton.store_case import CONTENTS, expected, random_content, random_store_case
from kvtuner_triton.store_token import store_by_location

BITS = st.sampled_from([8, 4, 2])


def check(case, decode):
    before, truth = [x.cpu().clone() for x in case.written], expected(case)
    if decode:
        case.run(decode)
    else:
        first, second = case.items
        case.store(first)
        for tail, old in zip((case.tail_key, case.tail_value), before[4:6], strict=True):
            require_kept(case, tail.cpu(), old)
        case.store(second)
    assert case.wrong(truth) == []


def require_kept(case, tail, old):
    """Attention, which comes now, reads what the page in which a request begins had before."""
    page = tail.shape[1]
    for slot, end, new in zip(case.slots.tolist(), case.seq_lens.tolist(), case.new_lens.tolist(), strict=True):
        assert torch.equal(tail[slot, :(end - new) % page], old[slot, :(end - new) % page])


def draw_format(data):
    boosted = data.draw(st.booleans())
    key = {"key_bits": 4, "symmetric": (False, data.draw(st.booleans()))} if boosted else {
        "key_bits": data.draw(BITS), "symmetric": data.draw(st.tuples(st.booleans(), st.booleans()))}
    return {"head_dim": data.draw(st.sampled_from([64, 128])), "kv_heads": data.draw(st.integers(1, 2)),
            "page": data.draw(st.sampled_from([64, 128])), "value_bits": data.draw(BITS), "boosted": boosted, **key,
            "group": data.draw(st.integers(1, 4)), "content": data.draw(st.sampled_from(CONTENTS)),
            "dtype": data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32])),
            "seed": data.draw(st.integers(0, 99))}


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_extend_from_anywhere_to_anywhere(device, data):
    fmt = draw_format(data)
    starts = data.draw(st.lists(st.one_of(st.just(0), st.integers(0, 2 * fmt["page"])), min_size=1, max_size=3))
    news = [data.draw(st.one_of(st.sampled_from([1, fmt["page"], 2 * fmt["page"]]), st.integers(1, 150)))
            for _ in starts]
    ends = [start + new for start, new in zip(starts, news, strict=True)]
    check(random_store_case(ends, news, device=device, **fmt), decode=False)


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_decode_steps(device, data):
    fmt = draw_format(data)
    near = st.sampled_from([1, fmt["page"], fmt["page"] + 1, 2 * fmt["page"]])
    ends = data.draw(st.lists(st.one_of(near, st.integers(1, 300)), min_size=1, max_size=4))
    check(random_store_case(ends, [1] * len(ends), device=device, **fmt), decode=True)


@pytest.mark.parametrize(("key_bits", "value_bits", "boosted", "dtype"), [
    (8, 8, False, torch.float16), (4, 4, True, torch.bfloat16), (2, 2, False, torch.float32)])
@pytest.mark.parametrize(("page", "head_dim"), [(64, 64), (64, 128), (128, 64), (128, 128)])
def test_every_size_of_page_and_head(device, page, head_dim, key_bits, value_bits, boosted, dtype):
    """A request begins inside a page and ends inside another; of two steps one completes a page."""
    for ends, news in (([2 * page + 3], [page + 40]), ([page, 2 * page - 1], [1, 1])):
        case = random_store_case(ends, news, kv_heads=2, head_dim=head_dim, page=page, key_bits=key_bits,
                                 value_bits=value_bits, symmetric=(False, boosted), boosted=boosted, dtype=dtype,
                                 device=device)
        check(case, decode=len(ends) > 1)


def test_padded_requests_write_to_slot_0_alone(device):
    case = random_store_case([64, 70, 1], [1, 1, 1], kv_heads=1, head_dim=64, page=64, key_bits=4, value_bits=4,
                             device=device)
    case.req_to_token[0] = 0
    case.slots[2] = 0
    check(case, decode=True)


@pytest.mark.parametrize("boosted", [False, True])
@pytest.mark.parametrize("content", CONTENTS)
def test_groups_of_every_kind(device, content, boosted):
    case = random_store_case([64], [64], kv_heads=1, head_dim=64, page=64, key_bits=4, value_bits=4,
                             symmetric=(False, True), boosted=boosted, content=content, device=device)
    check(case, decode=False)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_boosted_channels_are_those_the_query_weighs_most(device, head_dim):
    """One channel of each slot stands out in the query of the last token alone, so its 8-bit code is known."""
    case = random_store_case([64], [64], kv_heads=1, head_dim=head_dim, page=64, key_bits=4, value_bits=4,
                             symmetric=(False, True), boosted=True, device=device)
    random = torch.Generator().manual_seed(head_dim)
    slots = boost_slots(head_dim)
    chosen = torch.stack([c[torch.randint(len(c), (), generator=random)]
                          for c in ((slots == s).nonzero().flatten() for s in range(head_dim // 16))])
    case.q[-1] = 1
    case.q[-1, :, chosen.to(device)] = 100
    check(case, decode=False)
    page = int(case.req_to_token[int(case.slots[0]), 0]) // 64
    assert torch.signbit(case.keys.meta[page, 0, 0].cpu()).nonzero().flatten().tolist() == sorted(chosen.tolist())


def test_equally_important_channels_go_to_the_lower(device):
    case = random_store_case([64], [64], kv_heads=1, head_dim=128, page=64, key_bits=4, value_bits=4,
                             symmetric=(False, True), boosted=True, content="constant", device=device)
    check(case, decode=False)
    page = int(case.req_to_token[int(case.slots[0]), 0]) // 64
    boosted = torch.signbit(case.keys.meta[page, 0, 0].cpu()).nonzero().flatten()
    assert boosted.tolist() == [0, 1, 2, 3, 64, 65, 66, 67]


def test_boosted_keys_need_queries(device):
    case = random_store_case([64], [1], kv_heads=1, head_dim=64, page=64, key_bits=4, value_bits=4, boosted=True,
                             device=device)
    with pytest.raises(ValueError, match="queries"):
        store_decode(case.key, case.value, case.keys, case.values, case.tail_key, case.tail_value, case.req_to_token,
                     case.slots, case.seq_lens)


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_tokens_at_any_location(device, data):
    head_dim, kv_heads = data.draw(st.sampled_from([64, 128])), data.draw(st.integers(1, 2))
    page, pages = data.draw(st.sampled_from([1, 3, 64])), 40
    formats = [TensorFormat(data.draw(BITS), data.draw(st.sampled_from([None, 32, 64])), data.draw(st.booleans()))
               for _ in range(2)]
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    count = data.draw(st.integers(1, 39))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    wide = random_content(data.draw(st.sampled_from(CONTENTS)), (count, 3, kv_heads, head_dim), random, dtype)
    locations = torch.randperm((pages - 1) * page, generator=random)[:count] + page
    packed, truths = [], []
    for i, fmt in enumerate(formats):
        shape = (pages, kv_heads, page)
        codes = torch.zeros((*shape, head_dim * fmt.bits // 8), dtype=torch.uint8)
        meta = torch.zeros((*shape, fmt.groups(head_dim), fmt.metadata_values), dtype=torch.float16)
        packed.append(PackedPages(fmt.bits, codes.to(device), meta.to(device)))
        at = (locations // page, slice(None), locations % page)
        codes[at], meta[at] = reference.encode(fmt, wide[:, i])[:2]
        truths.append((codes, meta))
    wide = wide.to(device)
    store_by_location(wide[:, 0], wide[:, 1], *packed, locations.to(device))
    for (codes, meta), got in zip(truths, packed, strict=True):
        assert torch.equal(got.codes.cpu(), codes)
        assert torch.equal(got.meta.cpu().view(torch.int16), meta.view(torch.int16))


@pytest.mark.parametrize("decode", [False, True])
def test_pages_and_slots_anywhere(device, decode, place):
    ends = [PAGE, 2 * PAGE, 3 * PAGE + 5]
    case = random_store_case(ends, [1, 1, 1] if decode else [PAGE, 70, 90], kv_heads=KV_HEADS, head_dim=HEAD_DIM,
                             page=PAGE, key_bits=8, value_bits=8, symmetric=(False, True), device=device)
    truth, far = expected(case), moved(case, place)
    far.run(decode)
    for whole, rows in zip(far.written, truth.written, strict=True):
        require_written(whole, rows)


def test_locations_anywhere(device, place):
    fmt, random = TensorFormat(8), torch.Generator().manual_seed(0)
    wide = random_content("normal", (70, 2, KV_HEADS, HEAD_DIM), random, torch.bfloat16)
    locations = torch.randperm(2 * PAGE, generator=random)[:70]
    codes = torch.zeros((2, KV_HEADS, PAGE, HEAD_DIM), dtype=torch.uint8)
    meta = torch.zeros((2, KV_HEADS, PAGE, 1, fmt.metadata_values), dtype=torch.float16)
    far = [PackedPages(fmt.bits, behind(codes.to(device), place), behind(meta.to(device), place)) for _ in range(2)]
    store_by_location(*wide.to(device).unbind(1), *far, locations.to(device) + place * PAGE)
    at = (locations // PAGE, slice(None), locations % PAGE)
    for i, packed in enumerate(far):
        codes[at], meta[at] = reference.encode(fmt, wide[:, i])[:2]
        require_written(packed.codes, codes)
        require_written(packed.meta, meta)
