"""The command line of every node: written down before it runs, ready to paste."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvtuner_sglang.config import QuantConfig, RunConfig, ServerConfig
from kvtuner_sglang.cpu_engine.environment import cpu_server_arguments, cpu_server_environment
from kvtuner_sglang.errors import UserError
from kvtuner_sglang.plugin.options import KvtunerOptions, flags_of
from kvtuner_sglang.serving.checkpoint import Checkpoint
from kvtuner_sglang.serving.device import Device, serving_device
from kvtuner_sglang.serving.dummy_checkpoint import is_dummy
from kvtuner_sglang.serving.ports import Ports

DIST_TIMEOUT_S = 300
PLAIN_ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",  # the launcher reads the log while the node runs
    # /health then says only that the process answers: asking it never adds a request to a measurement.
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false",
    "SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS": "0",  # else a node waits 60 s at its end
}


@dataclass(frozen=True)
class Measurement:
    """Flags for measurements only, shown in /server_info: relative noise on K and V, folder for whole logits."""

    kv_noise: float = 0.0
    logits_dir: Path | None = None


@dataclass(frozen=True)
class NodeCommand:
    """One node: `argv` as run and the `environment` added to the user's own."""

    node_rank: int
    argv: tuple[str, ...]
    environment: dict[str, str]
    host: str
    http_port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.http_port}"

    def script(self) -> str:
        """A shell script that starts this node alone."""
        words = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        words += [shlex.join(self.argv[:3])]
        words += [shlex.join(pair) for pair in _pairs(self.argv[3:])]
        return "#!/bin/sh\nexec env \\\n  " + " \\\n  ".join(words) + "\n"


def kvtuner_options(quant: QuantConfig, server: ServerConfig, heartbeat_dir: Path,
                    measurement: Measurement) -> KvtunerOptions:
    """What the plugin of every node is asked for; the byte budget and the sign of life without quantization, too."""
    return replace(
        quant.options(), kvtuner_kv_gib=server.kv_gib, kvtuner_attention=server.attention,
        kvtuner_heartbeat_dir=str(heartbeat_dir),
        kvtuner_kv_noise=measurement.kv_noise,
        kvtuner_logits_dir=None if measurement.logits_dir is None else str(measurement.logits_dir),
    )


def node_commands(config: RunConfig, checkpoint: Checkpoint, ports: Ports, heartbeat_dir: Path,
                  measurement: Measurement | None = None) -> tuple[NodeCommand, ...]:
    """One command per node, node 0 first; every node gets the same plugin flags."""
    device = serving_device(config.server)
    if device == "cpu" and config.quant.kv_cache_dtype != "auto":
        raise UserError(f"quant={config.quant.name} is SGLang's own 8-bit cache, which needs an NVIDIA GPU: leave it "
                        "out.")
    quant = kvtuner_options(config.quant, config.server, heartbeat_dir, measurement or Measurement())
    commands = []
    for node_rank, (host, port) in enumerate(zip(config.dist.hosts, ports.http, strict=True)):
        argv = (
            sys.executable, "-m", "sglang.launch_server", "--model-path", str(checkpoint.path),
            *_parallel_flags(config, ports, node_rank, device),
            *flags_of(quant),
            "--host", host, "--port", str(port),
            *_server_flags(config, device, is_dummy(checkpoint)),
        )
        commands.append(NodeCommand(node_rank, argv, _environment(config, node_rank, device), host, port))
    return tuple(commands)


def _parallel_flags(config: RunConfig, ports: Ports, node_rank: int, device: Device) -> list[str]:
    dist = config.dist
    flags = ["--tp-size", str(dist.tp), "--pp-size", str(dist.pp)]
    if dist.nnodes > 1:
        flags += ["--nnodes", str(dist.nnodes), "--node-rank", str(node_rank)]
        if device == "cuda":
            # The local launcher's nodes share this host's GPUs.  SGLang takes for a rank GPU base_gpu_id + (pp_rank %
            # pp_size_per_node) * tp_size_per_node + tp_rank % tp_size_per_node (entrypoints/engine.py): it counts
            # within a node, from 0 whether nodes split tp or pp, so each node's base is the ranks of those before it.
            # Not CUDA_VISIBLE_DEVICES: every rank would say cuda:0, and the user's own setting would be overwritten.
            flags += ["--base-gpu-id", str(node_rank * dist.ranks // dist.nnodes)]
    if ports.dist is not None:
        flags += ["--dist-init-addr", f"{dist.hosts[0]}:{ports.dist}"]
    if dist.ranks > 1:
        flags += ["--dist-timeout", str(DIST_TIMEOUT_S), "--disable-custom-all-reduce"]
    return flags


def serving_dtype(config: RunConfig, device: Device) -> str:
    """The precision of weights and activations on this device."""
    return config.model.dtype_cpu if device == "cpu" else config.model.dtype_cuda


def _server_flags(config: RunConfig, device: Device, random_weights: bool) -> list[str]:
    server = config.server
    flags = [
        "--device", device,
        "--dtype", serving_dtype(config, device),
        "--context-length", str(server.context_length),
        "--max-running-requests", str(server.max_running_requests),
        "--chunked-prefill-size", str(server.chunked_prefill_tokens),
        "--random-seed", str(config.seed),
        "--log-level-http", "warning",
    ]
    if config.quant.page_size is not None:
        flags += ["--page-size", str(config.quant.page_size)]
    if random_weights:
        flags += ["--load-format", "dummy"]
    if device == "cpu":
        flags += cpu_server_arguments()
    else:
        flags += _cuda_flags(config)
    if not config.quant.enabled:  # with quantization the plugin brings its own
        flags += ["--attention-backend", _attention_backend(config, device)]
    if config.quant.kv_cache_dtype != "auto":
        flags += ["--kv-cache-dtype", config.quant.kv_cache_dtype]
    return flags


def _cuda_flags(config: RunConfig) -> list[str]:
    # Greedy decoding takes the largest logit whatever samples; FlashInfer's sampling would be compiled at the start.
    flags = ["--sampling-backend", "pytorch"]
    if config.model.dtype_cuda == "float32":
        # For comparisons, not for speed: see plugin/plain_layers.py.
        return [*flags, "--cuda-graph-backend-prefill", "disabled", "--cuda-graph-backend-decode", "disabled"]
    # Formats compare alike: the plugin captures no prefill, so nobody does, which also saves a minute at the start.
    return [*flags, "--cuda-graph-backend-prefill", "disabled",
            "--cuda-graph-max-bs-decode", str(config.server.max_running_requests)]


def _attention_backend(config: RunConfig, device: Device) -> str:
    """SGLang's own, named so that it is the same on every GPU: FlashInfer; in float32 the one that multiplies in it.

    FlashInfer has no float32 and Triton's dot product rounds it to TF32.
    """
    return "torch_native" if serving_dtype(config, device) == "float32" or device == "cpu" else "flashinfer"


def _environment(config: RunConfig, node_rank: int, device: Device) -> dict[str, str]:
    dist = config.dist
    if device == "cuda":
        cuda = {
            "GLOO_SOCKET_IFNAME": dist.interface, "NCCL_SOCKET_IFNAME": dist.interface,
            # The byte budget is given, so GPUs that other processes use, too, need not be equally free.
            "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "false",
        }
        if config.model.dtype_cuda == "float32":
            cuda["SGLANG_IS_FLASHINFER_AVAILABLE"] = "false"  # it has no float32, and would compile for a minute
        return {**PLAIN_ENVIRONMENT, **cuda}
    cpu = cpu_server_environment(dist.tp, dist.ranks, node_rank, interface=dist.interface)
    return {**PLAIN_ENVIRONMENT, **cpu}


def write_commands(commands: Sequence[NodeCommand], folder: Path) -> list[Path]:
    """Write node<i>.sh for every node; raises UserError if `folder` cannot be written."""
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for command in commands:
            path = folder / f"node{command.node_rank}.sh"
            path.write_text(command.script())
            path.chmod(0o755)
            paths.append(path)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): choose another runs_dir.") from error
    return paths


def _pairs(arguments: Sequence[str]) -> list[list[str]]:
    """Each flag with its value, so that a script shows one of them a line."""
    pairs: list[list[str]] = []
    for word in arguments:
        if word.startswith("--") or not pairs:
            pairs.append([word])
        else:
            pairs[-1].append(word)
    return pairs
