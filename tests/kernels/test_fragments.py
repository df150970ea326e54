"""Fragment order: reversible, and every code where the docstring of fragments.py says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtuner_triton import fragments

SHAPES = given(st.sampled_from([8, 4, 2]), st.sampled_from([64, 128]), st.sampled_from([32, 64, 128]),
               st.integers(0, 2**32 - 1))


def random_codes(bits, head_dim, page, seed):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (2, 3, page, head_dim), generator=random, dtype=torch.uint8)


@settings(max_examples=20, deadline=None)
@SHAPES
def test_order_is_reversible(bits, head_dim, page, seed):
    codes = random_codes(bits, head_dim, page, seed)
    for order, restore in ((fragments.order_keys, fragments.restore_keys),
                           (fragments.order_values, fragments.restore_values)):
        packed = order(codes, bits)
        assert packed.shape == (2, 3, page, head_dim * bits // 8)
        assert torch.equal(restore(packed, bits), codes)


@settings(max_examples=20, deadline=None)
@SHAPES
def test_every_code_is_where_the_formula_says(bits, head_dim, page, seed):
    codes = random_codes(bits, head_dim, page, seed)
    keys = fragments.order_keys(codes, bits)[1, 2].flatten().tolist()
    values = fragments.order_values(codes, bits)[1, 2].flatten().tolist()
    tile_bytes = 32 * head_dim * bits // 8
    for token in range(0, page, 5):
        for channel in range(seed % 3, head_dim, 3):
            code = int(codes[1, 2, token, channel])
            inside, base = token % 32, token // 32 * tile_bytes
            u = channel % (head_dim // 4) // 2
            at = place(u, 2, inside // 2 % 2, inside // 4, channel // (head_dim // 4), channel % 2, inside % 2, bits)
            assert field(keys[base + at], u, bits) == code
            u, m, g = inside % 4, channel % (head_dim // 8) // 2, channel // (head_dim // 8)
            at = place(u, head_dim // 16, m, g, inside // 8, inside // 4 % 2, channel % 2, bits)
            assert field(values[base + at], u, bits) == code


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([64, 128]), st.sampled_from([32, 64, 128]), st.integers(0, 2**32 - 1))
def test_second_halves_are_where_the_formula_says(head_dim, page, seed):
    slots = head_dim // 16
    halves = random_codes(4, slots, page, seed)
    packed = fragments.order_slots(halves)
    assert packed.shape == (2, 3, page, slots // 2)
    assert torch.equal(fragments.restore_slots(packed), halves)
    units = packed[1, 2].flatten().view(torch.int16).tolist()
    for token in range(page):
        tile, g, i = token // 32, token % 32 // 4, token % 4
        for slot in range(slots):
            assert (units[(8 * tile + g) * slots + slot] >> 4 * i) & 15 == int(halves[1, 2, token, slot])


def place(u, row_tiles, m, g, t, e, half, bits):
    """Byte in a tile, from the docstring."""
    word = u // (8 // bits) * row_tiles + m
    return 512 * (word // 4) + 16 * (4 * g + t) + 4 * (word % 4) + 2 * e + half


def field(byte, u, bits):
    return (byte >> (u % (8 // bits) * bits)) & (2**bits - 1)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_lane_reads_16_bytes_that_are_its_own(bits):
    """Changing codes of one lane's rows and columns changes bytes of that lane only."""
    codes = torch.zeros(1, 32, 64, dtype=torch.uint8)
    codes[:, 4 * 5:4 * 6, 16 * 2:16 * 3] = 1  # tokens of g = 5, channels of t = 2
    packed = fragments.order_keys(codes, bits).view(-1, 32, 16)
    assert packed[:, 4 * 5 + 2].any(-1).all()
    packed[:, 4 * 5 + 2] = 0
    assert not packed.any()
