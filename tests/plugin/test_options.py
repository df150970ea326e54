"""The flags as users type them, and what they become."""

import argparse
import pickle
from pathlib import Path

import pytest

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.plugin.attention_choice import (
    choose_attention,
    refuse_old_gpus,
    refuse_other_devices,
    refuse_without_kernels,
)
from kvtuner_sglang.plugin.options import (
    KvtunerOptions,
    add_cli_flags,
    flags_of,
    options_from_namespace,
    pop_options,
)
from kvtuner_sglang.quant import KVFormat, TensorFormat


def parse(*words: str) -> KvtunerOptions:
    parser = argparse.ArgumentParser()
    add_cli_flags(parser)
    return options_from_namespace(parser.parse_args(words))


def test_the_seeds_own_flags():
    options = parse("--enable-kvtuner-quant", "--kvtuner-nbits-key", "4", "--kvtuner-nbits-value", "4")
    assert options.enabled
    (fmt,) = options.plan(1)
    assert (fmt.key.bits, fmt.value.bits) == (4, 4)
    assert not parse("--enable-kvtuner-quant=False").enabled
    assert parse("--enable-kvtuner-quant=True").enabled
    assert not parse().enabled


def test_keys_and_values_apart():
    (fmt,) = parse(
        "--enable-kvtuner-quant",
        "--kvtuner-nbits-key",
        "8",
        "--kvtuner-nbits-value",
        "2",
        "--kvtuner-q-group-size",
        "32",
        "--kvtuner-asym",
        "False",
    ).plan(1)
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


@pytest.mark.parametrize("keywords", [
    {"kvtuner_nbits_key": 8}, {"kvtuner_nbits_value": 2}, {"kvtuner_axis_key": 0}, {"kvtuner_q_group_size": 32},
    {"kvtuner_asym": False}, {"kvtuner_key_boost": True}, {"kvtuner_kv_noise": 1e-6},
    {"kvtuner_layer_config_file": "preset:qwen2_5_7b_kivi_3_18"},
])
def test_a_format_without_the_switch_is_refused(keywords):
    (name,) = keywords
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is given but quantization is off"):
        KvtunerOptions(**keywords)
    assert KvtunerOptions(kvtuner_kv_gib=1, kvtuner_heartbeat_dir="x", kvtuner_logits_dir="y")


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
        KvtunerOptions(enable_kvtuner_quant=True, kvtuner_layer_config_file="preset:llama_3_1_8b_kivi_3_25"),
    ],
)
def test_flags_give_the_same_options_back(options):
    assert parse(*flags_of(options)) == options


@pytest.mark.parametrize(("asked", "on_cpu", "expected"), [
    ("auto", True, "reference"), ("auto", False, "fused"), ("reference", False, "reference"), ("fused", False, "fused"),
])
def test_the_kernels_serve_where_there_is_a_gpu_unless_told_otherwise(asked, on_cpu, expected):
    assert choose_attention(asked, on_cpu) == expected


def test_kernels_on_a_cpu_are_refused():
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU"):
        choose_attention("fused", on_cpu=True)


def test_a_gpu_that_is_not_nvidias_is_refused(monkeypatch):
    monkeypatch.setattr("torch.version.cuda", "13.0")
    refuse_other_devices("cpu")
    refuse_other_devices("cuda")
    with pytest.raises(ConfigError, match="device xpu"):
        refuse_other_devices("xpu")
    monkeypatch.setattr("torch.version.cuda", None)  # as of ROCm
    refuse_other_devices("cpu")
    with pytest.raises(ConfigError, match="device cuda of this torch"):
        refuse_other_devices("cuda")


def test_gpus_without_the_kernels_instructions_are_refused():
    for capability in ((8, 0), (8, 9), (9, 0), (12, 0)):
        refuse_old_gpus(capability)
    with pytest.raises(ConfigError, match=r"from sm_80 on, and this one is sm_75: give --kvtuner-attention reference"):
        refuse_old_gpus((7, 5))


@pytest.mark.parametrize(("fmt", "head_dim", "match"), [
    (KVFormat(TensorFormat(4, axis=1), TensorFormat(4)), 96, "64 or 128 channels, not 96"),
    (KVFormat(TensorFormat(16), TensorFormat(4)), 64, "not 16 for one of them"),
    (KVFormat(TensorFormat(4, axis=1), TensorFormat(4, group_size=32)), 64, "one scale a token"),
])
def test_what_the_kernels_cannot_read_is_refused(fmt, head_dim, match):
    with pytest.raises(ConfigError, match=match) as refused:
        refuse_without_kernels([fmt], head_dim)
    assert "--kvtuner-attention reference" in str(refused.value)
    readable = KVFormat(TensorFormat(4), TensorFormat(4, group_size=32))
    refuse_without_kernels([readable], 64)
    if head_dim == 64:
        with pytest.raises(ConfigError, match="layer 1"):
            refuse_without_kernels([readable, fmt], head_dim)


def planned(**flags: object) -> KvtunerOptions:
    return KvtunerOptions(enable_kvtuner_quant=True, **flags)


@pytest.fixture
def older_form(tmp_path):
    path = tmp_path / "layers.json"
    path.write_text('{"layer_bits": {"0": 8, "2-3": 2}, "default_bits": 4}')
    return str(path)


def test_the_older_json_form_takes_all_but_bits_from_the_flags(older_form):
    options = parse("--enable-kvtuner-quant", "--kvtuner-layer-config-file", older_form, "--kvtuner-axis-key", "0",
                    "--kvtuner-q-group-size", "32")
    plan = options.plan(5)
    assert [fmt.key.bits for fmt in plan] == [fmt.value.bits for fmt in plan] == [8, 4, 2, 2, 4]
    assert {(fmt.key.axis, fmt.key.group_size) for fmt in plan} == {(0, 32)}
    assert options.page_tokens(None) == 1
    per_channel = planned(kvtuner_layer_config_file=older_form)
    assert per_channel.page_tokens(None) == 64
    assert [fmt.key.boosted for fmt in per_channel.plan(5)] == [False, True, False, False, True]


def test_the_pages_of_a_plan_are_the_servers(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("model: {architecture: A, layers: 1, kv_heads: 1, head_dim: 64}\npage_size: 128\n"
                    "layers: {0: {nbits_key: 4, nbits_value: 2}}\n")
    options = planned(kvtuner_layer_config_file=str(path))
    assert options.page_tokens(None) == options.page_tokens(128) == 128
    with pytest.raises(ConfigError, match=r"plan.yaml: the plan is for pages of 128 tokens .* pages of 64: leave"):
        options.page_tokens(64)


def test_a_plan_travels_with_the_options_and_is_read_once(older_form):
    options = pickle.loads(pickle.dumps(planned(kvtuner_layer_config_file=older_form)))
    Path(older_form).unlink()
    assert [fmt.key.bits for fmt in options.plan(4)] == [8, 4, 2, 2]


@pytest.mark.parametrize(("flags", "match"), [
    ({"kvtuner_nbits_key": 8}, "leave --kvtuner-nbits-key"),
    ({"enable_kvtuner_quant": False}, "quantization is off"),
    ({"kvtuner_layer_config_file": "/no/plan.yaml"}, "cannot be read"),
    ({"kvtuner_layer_config_file": "preset:qwen2_5_7b_kivi_3_18", "kvtuner_axis_key": 0}, "leave --kvtuner-axis-key"),
])
def test_what_does_not_go_with_a_plan_is_refused(older_form, flags, match):
    with pytest.raises(ConfigError, match=match):
        KvtunerOptions(**{"enable_kvtuner_quant": True, "kvtuner_layer_config_file": older_form, **flags})
