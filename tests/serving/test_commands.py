"""Node command lines: the seed's own flags are a frozen surface, and a script runs as it is pasted."""

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

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
    assert flags(commands[0])["dtype"] == "bfloat16"
    assert "SGLANG_USE_CPU_ENGINE" not in commands[0].environment


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
