"""An engine that serves something else than was asked for is no measurement of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from kvtuner_sglang import command_line
from kvtuner_sglang.errors import MeasurementInvalid
from kvtuner_sglang.speed.validity import require_engine

CONF = Path(__file__).parents[2] / "conf"
PLAIN = {"pool_class": "MHATokenToKVPool", "dtype": "bfloat16", "attention": "flashinfer"}
PACKED = {"pool_class": "PackedKVPool", "dtype": "bfloat16", "attention": "fused"}
FP8 = PLAIN | {"dtype": "float8_e4m3fn"}


def look_at(spec, rank, *words, device="cuda"):
    config = command_line.load(["task=speed", "model=tiny_dummy", "speed=tiny", *words], CONF)
    require_engine(rank, config, replace(spec, device=device, engine={"dtype": "bfloat16"}))


@pytest.mark.parametrize(("rank", "words"), [
    (PLAIN, ["quant=bf16"]),
    (PLAIN | {"attention": "triton"}, ["quant=bf16", "speed.backend=triton"]),
    (FP8, ["quant=fp8"]),
    (PACKED, ["quant=kv4"]),
    (PACKED | {"attention": "fused, portable decode"}, ["quant=kv4"]),
    (PACKED | {"attention": "reference"}, ["quant=kv4", "server.attention=reference"]),
])
def test_what_was_asked_for_counts(spec, rank, words):
    look_at(spec, rank, *words)


def test_on_a_cpu_torch_attends(spec):
    look_at(spec, PLAIN | {"attention": "torch_native"}, "quant=bf16", device="cpu")
    look_at(spec, PACKED | {"attention": "reference"}, "quant=kv4", device="cpu")


@pytest.mark.parametrize(("rank", "words", "part"), [
    (PLAIN, ["quant=fp8"], "its dtype is bfloat16 but quant=fp8 asks for float8_e4m3fn"),
    (FP8, ["quant=bf16"], "its dtype is float8_e4m3fn but quant=bf16 asks for bfloat16"),
    (PLAIN | {"dtype": "float16"}, ["quant=bf16"], "its dtype is float16"),
    (PLAIN, ["quant=bf16", "speed.backend=triton"], "its attention is flashinfer but quant=bf16 asks for triton"),
    (PLAIN, ["quant=kv4"], "its pool is MHATokenToKVPool but quant=kv4 asks for PackedKVPool"),
    (PACKED | {"attention": "reference"}, ["quant=kv4"], "its attention is reference but quant=kv4 asks for fused"),
    (PACKED | {"dtype": "float8_e4m3fn"}, ["quant=kv4"], "its dtype is float8_e4m3fn"),
])
def test_anything_else_is_no_measurement(spec, rank, words, part):
    with pytest.raises(MeasurementInvalid, match=f"^same_format: .*{part}"):
        look_at(spec, rank, *words)
