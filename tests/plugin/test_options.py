"""The flags as users type them, and what they become."""

import argparse

import pytest

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.plugin.options import (
    KvtunerOptions,
    add_cli_flags,
    flags_of,
    options_from_namespace,
    pop_options,
)


def parse(*words: str) -> KvtunerOptions:
    parser = argparse.ArgumentParser()
    add_cli_flags(parser)
    return options_from_namespace(parser.parse_args(words))


def test_the_seeds_own_flags():
    options = parse("--enable-kvtuner-quant", "--kvtuner-nbits-key", "4", "--kvtuner-nbits-value", "4")
    assert options.enabled
    assert (options.kv_format().key.bits, options.kv_format().value.bits) == (4, 4)
    assert not parse("--enable-kvtuner-quant=False").enabled
    assert parse("--enable-kvtuner-quant=True").enabled
    assert not parse().enabled


def test_keys_and_values_apart():
    fmt = parse(
        "--enable-kvtuner-quant",
        "--kvtuner-nbits-key",
        "8",
        "--kvtuner-nbits-value",
        "2",
        "--kvtuner-q-group-size",
        "32",
        "--kvtuner-asym",
        "False",
    ).kv_format()
    assert (fmt.key.bits, fmt.value.bits, fmt.key.group_size, fmt.key.symmetric) == (8, 2, 32, True)


@pytest.mark.parametrize(
    "words",
    [
        ["--kvtuner-nbits-key", "3"],
        ["--kvtuner-nbits-value", "1"],
        ["--enable-kvtuner-quant", "perhaps"],
        ["--kvtuner-axis-value", "1"],
    ],
)
def test_argparse_refuses_what_does_not_exist(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(*words)
    assert stopped.value.code == 2
    assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "keywords",
    [
        {"kvtuner_nbits_keys": 4},
        {"enable_kvtuner_quant": True, "kvtuner_nbits_key": 3},
        {"kvtuner_kv_gib": 0},
        {"enable_kvtuner_quant": True, "kvtuner_nbits_key": 16, "kvtuner_nbits_value": 16},
        {"kvtuner_kv_noise": 2},
        {"kvtuner_residual_length": 128},
    ],
)
def test_engine_keywords_are_checked(keywords):
    with pytest.raises(ConfigError, match=r"\.$"):
        pop_options(dict(keywords))


def test_pop_leaves_sglangs_own_keywords():
    keywords = {"model_path": "m", "enable_kvtuner_quant": True, "kvtuner_nbits_key": 2}
    assert pop_options(keywords).kvtuner_nbits_key == 2
    assert keywords == {"model_path": "m"}


@pytest.mark.parametrize(
    "options",
    [
        KvtunerOptions(),
        KvtunerOptions(kvtuner_kv_gib=0.5),
        KvtunerOptions(enable_kvtuner_quant=True),
        KvtunerOptions(
            enable_kvtuner_quant=True,
            kvtuner_nbits_key=8,
            kvtuner_nbits_value=2,
            kvtuner_asym=False,
            kvtuner_key_boost=False,
            kvtuner_q_group_size=32,
            kvtuner_kv_noise=1e-6,
            kvtuner_logits_dir="x",
            kvtuner_heartbeat_dir="y",
        ),
    ],
)
def test_flags_give_the_same_options_back(options):
    assert parse(*flags_of(options)) == options
