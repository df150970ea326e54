"""Bytes per token, effective bits and the refusals of quant/format.py."""

import pytest

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.quant import KVFormat, KVShape, TensorFormat, format_hash, kv_format, uniform_plan

QWEN_7B = KVShape(kv_heads=4, head_dim=128, itemsize=2, page_size=1)


def uniform(bits_key: int, bits_value: int, layers: int = 28, **options):
    return uniform_plan(KVFormat(TensorFormat(bits_key, **options), TensorFormat(bits_value, **options)), layers)


@pytest.mark.parametrize(
    ("bits", "expected"), [(16, 57344), (8, 28 * 8 * (128 + 4)), (4, 28 * 8 * (64 + 4)), (2, 28 * 8 * (32 + 4))]
)
def test_bytes_per_token_of_a_7b_model(bits, expected):
    assert QWEN_7B.bytes_per_token(uniform(bits, bits)) == expected


def test_effective_bits_count_metadata():
    shape = KVShape(kv_heads=3, head_dim=64, itemsize=4, page_size=1)
    assert shape.effective_bits(uniform(4, 4)) == 4.5
    assert shape.effective_bits(uniform(4, 4, symmetric=True)) == 4.25
    assert shape.effective_bits(uniform(4, 4, group_size=32)) == 5.0
    assert shape.effective_bits(uniform(16, 16)) == 16


def test_per_channel_metadata_is_shared_by_the_page():
    shape = KVShape(kv_heads=3, head_dim=64, itemsize=2, page_size=64)
    plan = uniform_plan(KVFormat(TensorFormat(4, axis=1), TensorFormat(4)), 2)
    assert shape.effective_bits(plan) == 4.5
    assert shape.tail_bytes_per_slot(plan) == 2 * 64 * 3 * 64 * 2 * 2


def asked(bits_key: int, bits_value: int, **options):
    rest = {"axis_key": 1, "axis_value": 0, "group_size": None, "asym": True, "key_boost": None}
    return kv_format(bits_key=bits_key, bits_value=bits_value, **{**rest, **options})


def test_four_bit_keys_are_boosted_unless_told_otherwise():
    fmt = asked(4, 4)
    assert fmt.key == TensorFormat(4, axis=1, boosted=True)
    assert fmt.value == TensorFormat(4, symmetric=True)
    assert asked(4, 4, key_boost=False) == KVFormat(TensorFormat(4, axis=1), TensorFormat(4))
    for bits in ((8, 8), (2, 2), (8, 4), (4, 2)):
        assert not asked(*bits).key.boosted
        assert not asked(*bits).value.symmetric
    assert not asked(4, 4, axis_key=0).key.boosted
    assert not asked(4, 4, asym=False).key.boosted
    assert not asked(4, 2, key_boost=True).value.symmetric  # an offset would waste two of four levels


def test_bytes_of_boosted_keys():
    shape = KVShape(kv_heads=4, head_dim=128, itemsize=2, page_size=64)
    key = TensorFormat(4, axis=1, boosted=True)
    assert shape.tensor_bytes_per_token(key) == 4 * (64 + 4 + 128 * 4 / 64)
    assert shape.effective_bits([KVFormat(key, TensorFormat(4, symmetric=True))]) == (4.75 + 4.125) / 2


def test_keys_and_values_are_counted_apart():
    assert (
        QWEN_7B.bytes_per_token(uniform(8, 4))
        == (QWEN_7B.bytes_per_token(uniform(8, 8)) + QWEN_7B.bytes_per_token(uniform(4, 4))) / 2
    )


@pytest.mark.parametrize(
    "broken",
    [
        lambda: TensorFormat(3),
        lambda: TensorFormat(4, axis=2),
        lambda: TensorFormat(4, group_size=0),
        lambda: TensorFormat(4, group_size=48).groups(64),
        lambda: TensorFormat(4).code_bytes(63, 2),
        lambda: KVFormat(TensorFormat(4), TensorFormat(4, axis=1)),
        lambda: TensorFormat(4, boosted=True),
        lambda: TensorFormat(8, axis=1, boosted=True),
        lambda: TensorFormat(4, axis=1, boosted=True).code_bytes(40, 2),
    ],
)
def test_what_cannot_be_stored_is_refused_in_one_sentence(broken):
    with pytest.raises(ConfigError, match=r"\.$"):
        broken()


def test_the_hash_tells_plans_apart():
    plans = [
        uniform(4, 4),
        uniform(4, 8),
        uniform(8, 4),
        uniform(4, 4, symmetric=True),
        uniform(4, 4, group_size=32),
        uniform(4, 4, layers=27),
    ]
    assert len({format_hash(p) for p in plans}) == len(plans)
    assert format_hash(uniform(4, 4)) == format_hash(uniform(4, 4))
