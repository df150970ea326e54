"""Fake quantization reads back what the packed pool reads back, and metadata always counts."""

import pytest
import torch

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.quality.recipe import (
    PER_CHANNEL,
    KVRecipe,
    TensorRecipe,
    effective_bits,
    fake_quantize,
    hadamard,
    recipe_of,
)
from kvtuner_sglang.quality.recipes import ALL, LADDERS
from kvtuner_sglang.quant import KVFormat, KVShape, TensorFormat
from kvtuner_triton import reference

HEAD_DIM = 64


def draw(*shape: int) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    x[..., 3] *= 40  # a channel far out of line
    return x


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("symmetric", [False, True])
def test_whole_pages_per_channel_equal_the_pool(bits, symmetric):
    fmt = TensorFormat(bits, symmetric=symmetric, axis=1)
    recipe = recipe_of(KVFormat(fmt, TensorFormat(16)), 64).key
    x = draw(2, 130, HEAD_DIM)
    read_back = fake_quantize(recipe, x)
    for page in (0, 1):
        span = slice(64 * page, 64 * page + 64)
        assert torch.equal(read_back[:, span], reference.decode(fmt, *reference.encode(fmt, x[:, span])))
    assert not read_back[:, 128:].any()  # an incomplete page is not stored


def test_boosted_pages_equal_the_pool():
    fmt = TensorFormat(4, axis=1, boosted=True)
    recipe = recipe_of(KVFormat(fmt, TensorFormat(4, symmetric=True)), 64).key
    x, weight = draw(2, 130, HEAD_DIM), torch.rand(2, 2, HEAD_DIM)
    read_back = fake_quantize(recipe, x, weight)
    for page in (0, 1):
        span = slice(64 * page, 64 * page + 64)
        stored = reference.encode(fmt, x[:, span], weight[:, page])
        assert torch.equal(read_back[:, span], reference.decode(fmt, *stored))
    assert (read_back - x)[:, :128].square().sum() < 0.9 * (fake_quantize(TensorRecipe(4, PER_CHANNEL, 64), x) - x)[
        :, :128
    ].square().sum()


@pytest.mark.parametrize("group", [None, 32])
def test_per_token_equals_the_pool(group):
    fmt = TensorFormat(4, group_size=group)
    x = draw(2, 5, HEAD_DIM)
    recipe = recipe_of(KVFormat(TensorFormat(16), fmt), 1).value
    assert torch.equal(fake_quantize(recipe, x), reference.decode(fmt, *reference.encode(fmt, x)))


@pytest.mark.parametrize(("key", "value", "page"), [(4, 4, 64), (8, 8, 64), (2, 2, 64), (4, 2, 128), (16, 4, 64)])
def test_effective_bits_equal_those_of_the_format(key, value, page):
    fmt = KVFormat(TensorFormat(key, axis=1), TensorFormat(value))
    ours = effective_bits([recipe_of(fmt, page)], HEAD_DIM)
    assert ours == pytest.approx(KVShape(1, HEAD_DIM, 2, page).effective_bits([fmt]))


def test_boosted_keys_are_paid_for_by_symmetric_values():
    fmt = KVFormat(TensorFormat(4, axis=1, boosted=True), TensorFormat(4, symmetric=True))
    assert effective_bits([recipe_of(fmt, 64)], HEAD_DIM) == 4.5
    assert KVShape(1, HEAD_DIM, 2, 64).effective_bits([fmt]) == 4.5


def test_three_bits_lie_between_two_and_four():
    x = draw(2, 64, HEAD_DIM)
    errors = [(fake_quantize(TensorRecipe(b, PER_CHANNEL, 64), x) - x).square().mean().item() for b in (2, 3, 4)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    codes, _ = reference.quantize(x, 3, symmetric=False)
    assert codes.max() == 7


def test_clip_search_never_adds_error():
    x = draw(4, 64, HEAD_DIM)
    plain, searched = (fake_quantize(TensorRecipe(2, clip_search=c), x) for c in (False, True))
    before, after = ((y - x).square().sum(-1) for y in (plain, searched))
    assert (after <= before + 1e-5).all()
    assert after.sum() < 0.95 * before.sum()


def test_rotation_is_orthonormal_and_undone():
    h = hadamard(HEAD_DIM)
    assert torch.allclose(h @ h.T, torch.eye(HEAD_DIM), atol=1e-6)
    x = draw(2, 8, HEAD_DIM)
    rotated, plain = (fake_quantize(TensorRecipe(8, rotate=r), x) for r in (True, False))
    assert (rotated - x).abs().max() < 0.2  # spread over the head, 8 bits are nearly exact
    assert not torch.equal(rotated, plain)
    with pytest.raises(ConfigError, match="power of two"):
        hadamard(48)


def test_recipes_below_four_bits_are_below_four_bits():
    assert effective_bits([ALL["k3v3"]], HEAD_DIM) == 3.5
    assert effective_bits([ALL["k3v3_page128_symmetric_rotated_v"]], HEAD_DIM) == 3.25
    assert effective_bits([ALL["k4v2_page128"]], HEAD_DIM) == 3.375
    for ladder in LADDERS.values():
        fewest = KVRecipe(ladder.key[0], ladder.value[0])
        assert effective_bits([fewest], HEAD_DIM) < 3.25


def test_conditioning_is_for_keys_per_token_only():
    with pytest.raises(ConfigError, match="key_mean"):
        KVRecipe(TensorRecipe(4, PER_CHANNEL, 64), TensorRecipe(4), key_mean=True)
    with pytest.raises(ConfigError, match="values"):
        KVRecipe(TensorRecipe(4), TensorRecipe(4, PER_CHANNEL, 64))
