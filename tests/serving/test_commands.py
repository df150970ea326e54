"""Node command lines: the seed's own flags are a frozen surface, and a script runs as it is pasted."""

import ast
import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.serving.commands import Measurement, NodeCommand, node_commands, write_commands
from kvtuner_sglang.serving.device import serving_device
from kvtuner_sglang.serving.ports import Ports

HEARTBEAT = Path("/run/heartbeat")
TWO = Ports((30000, 30001), 29500)


def flags(command: NodeCommand) -> dict[str, str]:
    """Each flag of a command with its value, "" for a switch."""
    text = " " + shlex.join(command.argv[3:])
    return {k: v for k, _, v in (part.partition(" ") for part in text.split(" --")[1:])}


@pytest.mark.parametrize("node_rank", [0, 1])
def test_the_seeds_launch_line(compose, checkpoint_shape, node_rank: int) -> None:
    config = compose("quant=kv4", "dist=tp2pp2", "server.device=cpu")
    command = node_commands(config, checkpoint_shape, TWO, HEARTBEAT)[node_rank]
    assert command.argv[:3] == (sys.executable, "-m", "sglang.launch_server")
    seed = {
        "model-path": str(checkpoint_shape.path), "tp-size": "2", "pp-size": "2", "nnodes": "2",
        "node-rank": str(node_rank), "dist-init-addr": "127.0.0.1:29500", "enable-kvtuner-quant": "",
        "kvtuner-nbits-key": "4", "kvtuner-nbits-value": "4", "dist-timeout": "300", "disable-custom-all-reduce": "",
    }
    assert seed.items() <= flags(command).items()
    assert command.url == f"http://127.0.0.1:{30000 + node_rank}"


def test_all_flags_of_the_default_server(compose, checkpoint_shape) -> None:
    config = compose("quant=kv4", "server.device=cpu")
    (command,) = node_commands(config, checkpoint_shape, Ports((30000,), None), HEARTBEAT)
    assert flags(command).items() >= {
        "tp-size": "1", "pp-size": "1", "kvtuner-kv-gib": str(config.server.kv_gib),
        "kvtuner-heartbeat-dir": str(HEARTBEAT), "host": "127.0.0.1", "port": "30000", "device": "cpu",
        "dtype": "float32", "context-length": "2048", "max-running-requests": "8", "random-seed": "0",
        "chunked-prefill-size": str(config.server.chunked_prefill_tokens),
    }.items()
    assert not {"nnodes", "node-rank", "dist-init-addr", "attention-backend"} & set(flags(command))


def test_a_page_size_is_passed_on_when_chosen(compose, checkpoint_shape) -> None:
    config = compose("quant=kv4", "quant.page_size=128", "server.device=cpu")
    (command,) = node_commands(config, checkpoint_shape, Ports((30000,), None), HEARTBEAT)
    assert flags(command)["page-size"] == "128"


def test_full_precision_has_the_same_budget_and_sglangs_own_backend(compose, checkpoint_shape) -> None:
    config = compose("quant=bf16", "server.device=cpu")
    (command,) = node_commands(config, checkpoint_shape, Ports((30000,), None), HEARTBEAT)
    found = flags(command)
    assert "--enable-kvtuner-quant=False" in command.argv
    assert found["kvtuner-kv-gib"] == str(config.server.kv_gib)
    assert found["attention-backend"] == "torch_native"
    assert "kvtuner-nbits-key" not in found


def test_all_nodes_get_the_same_plugin_flags(compose, checkpoint_shape) -> None:
    config = compose("quant=k8v4_token", "dist=tp2pp2", "server.device=cpu", "quant.group_size=32", "quant.asym=false")
    first, second = (
        {k: v for k, v in flags(c).items() if "kvtuner" in k}
        for c in node_commands(config, checkpoint_shape, TWO, HEARTBEAT, Measurement(kv_noise=1e-6))
    )
    assert first == second
    assert first.items() >= {"kvtuner-nbits-key": "8", "kvtuner-nbits-value": "4", "kvtuner-q-group-size": "32",
                             "kvtuner-asym": "False", "kvtuner-kv-noise": "1e-06"}.items()


def test_a_gpu_has_its_own_dtype_and_each_node_its_own_gpus(compose, checkpoint_shape, monkeypatch) -> None:
    monkeypatch.setattr("kvtuner_sglang.serving.commands.serving_device", lambda _server: "cuda")
    commands = node_commands(compose("quant=kv4", "dist=tp2pp2"), checkpoint_shape, TWO, HEARTBEAT)
    assert [flags(c)["base-gpu-id"] for c in commands] == ["0", "2"]
    found = flags(commands[0])
    assert found["dtype"] == "bfloat16"
    assert found["cuda-graph-backend-prefill"] == "disabled"
    assert found["cuda-graph-max-bs-decode"] == "8"
    assert not {"attention-backend", "kv-cache-dtype", "load-format"} & set(found)
    assert "SGLANG_USE_CPU_ENGINE" not in commands[0].environment


def sglangs_own(file: str, name: str) -> Callable[..., Any]:
    """A pure function of SGLang's source, without its imports, which want a GPU's kernels."""
    tree = ast.parse((Path(importlib.util.find_spec("sglang").origin).parent / "srt" / file).read_text())
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    scope: dict[str, Any] = {"Tuple": tuple}
    exec(compile(ast.Module(found, []), file, "exec"), scope)
    return scope[name]


@pytest.mark.parametrize("dist", ["tp2_2nodes", "pp2_2nodes", "tp2pp2"])
def test_every_rank_of_two_nodes_has_a_gpu_of_its_own(compose, checkpoint_shape, monkeypatch, dist: str) -> None:
    """By SGLang's own ranges of ranks and its own formula for a rank's GPU."""
    ranges = sglangs_own("entrypoints/engine.py", "_calculate_rank_ranges")
    gpu_of = sglangs_own("weight_cache/protocol.py", "compute_local_gpu_id")
    monkeypatch.setattr("kvtuner_sglang.serving.commands.serving_device", lambda _server: "cuda")
    config, gpus = compose("quant=kv4", f"dist={dist}"), []
    for command in node_commands(config, checkpoint_shape, TWO, HEARTBEAT):
        pp_ranks, tp_ranks, *per_node = ranges(config.dist.nnodes, config.dist.pp, config.dist.tp, command.node_rank)
        base = int(flags(command)["base-gpu-id"])
        gpus += [gpu_of(pp, tp, *per_node, base) for pp in pp_ranks for tp in tp_ranks]
    assert gpus == list(range(config.dist.ranks))


def test_float32_on_a_gpu_is_served_by_what_multiplies_in_it(compose, checkpoint_shape, monkeypatch) -> None:
    monkeypatch.setattr("kvtuner_sglang.serving.commands.serving_device", lambda _server: "cuda")
    for quant, backend in (("bf16", "torch_native"), ("kv4", None)):
        config = compose(f"quant={quant}", "model.dtype_cuda=float32")
        (command,) = node_commands(config, checkpoint_shape, Ports((30000,), None), HEARTBEAT)
        found = flags(command)
        assert found["dtype"] == "float32"
        assert found.get("attention-backend") == backend
        assert found["cuda-graph-backend-decode"] == found["cuda-graph-backend-prefill"] == "disabled"
        assert command.environment["SGLANG_IS_FLASHINFER_AVAILABLE"] == "false"


def test_sglangs_own_eight_bits_on_a_gpu_alone(compose, checkpoint_shape, monkeypatch) -> None:
    one = Ports((30000,), None)
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        node_commands(compose("quant=fp8", "server.device=cpu"), checkpoint_shape, one, HEARTBEAT)
    monkeypatch.setattr("kvtuner_sglang.serving.commands.serving_device", lambda _server: "cuda")
    fp8, bf16 = (flags(node_commands(compose(f"quant={quant}"), checkpoint_shape, one, HEARTBEAT)[0])
                 for quant in ("fp8", "bf16"))
    assert fp8 == {**bf16, "kv-cache-dtype": "fp8_e4m3"}
    assert bf16["attention-backend"] == "flashinfer"


def test_random_weights_are_a_flag(compose, checkpoint_shape) -> None:
    checkpoint = replace(checkpoint_shape, source="dummy:tiny")
    (command,) = node_commands(compose("server.device=cpu"), checkpoint, Ports((30000,), None), HEARTBEAT)
    assert flags(command)["load-format"] == "dummy"


def test_the_script_runs_the_very_command(tmp_path: Path) -> None:
    show = "import os, sys; print(os.environ['AN_ADDITION'], sys.argv[1:])"
    argv = (sys.executable, "-c", show, "--flag", "two words", "--switch", "--last", "$HOME")
    command = NodeCommand(0, argv, {"AN_ADDITION": "it's here"}, "127.0.0.1", 1)
    (script,) = write_commands([command], tmp_path / "commands")
    said = subprocess.run([script], capture_output=True, text=True, check=True).stdout
    assert said == "it's here ['--flag', 'two words', '--switch', '--last', '$HOME']\n"


def test_an_unwritable_run_directory_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_commands([], tmp_path / "file" / "commands")


def test_device(compose, tmp_path: Path) -> None:
    server = compose().server
    assert serving_device(replace(server, device="auto"), dev=tmp_path) == "cpu"
    with pytest.raises(UserError, match=r"use server\.device=cpu"):
        serving_device(replace(server, device="cuda"), dev=tmp_path)
    (tmp_path / "nvidia0").touch()
    assert serving_device(replace(server, device="auto"), dev=tmp_path) == "cuda"
    assert serving_device(replace(server, device="cpu"), dev=tmp_path) == "cpu"
