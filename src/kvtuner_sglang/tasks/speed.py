"""task=speed: how fast one engine serves one format of one model, into a record."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from kvtuner_sglang.config import RunConfig
from kvtuner_sglang.errors import ConfigError, RunFailed
from kvtuner_sglang.evidence import tracking
from kvtuner_sglang.evidence.assemble import Figures
from kvtuner_sglang.evidence.outcome import Outcome
from kvtuner_sglang.evidence.record import Environment
from kvtuner_sglang.evidence.samples import SampleLog
from kvtuner_sglang.measure.hardware import Floor, peak_of
from kvtuner_sglang.measure.memory import ITEMSIZE
from kvtuner_sglang.serving.bounded_process import run_bounded
from kvtuner_sglang.serving.checkpoint import Checkpoint, prepare_checkpoint
from kvtuner_sglang.serving.commands import NodeCommand
from kvtuner_sglang.serving.device import serving_device
from kvtuner_sglang.serving.ports import choose_ports
from kvtuner_sglang.speed import console, plan
from kvtuner_sglang.speed.calls import SpeedResult, SpeedSpec, read_calls
from kvtuner_sglang.speed.figures import EngineSample, figures
from kvtuner_sglang.speed.validity import require_engine
from kvtuner_sglang.tasks.recorded import Attempt, record, require_plan
from kvtuner_sglang.tasks.run_directory import run_directory

Say = Callable[[str], None]


def run(config: RunConfig, overrides: Sequence[str], say: Say) -> Outcome:
    """Measure and write the record. Bad input raises UserError and leaves nothing behind.

    An engine that broke is an outcome with status failed, figures that may not count one with status invalid.
    """
    device = require_device(config)
    checkpoint = prepare_checkpoint(config.model.source, config.model.path, say)
    config.quant.require_fits(checkpoint.identity)
    dtype = config.model.dtype_cpu if device == "cpu" else config.model.dtype_cuda
    requests = plan.max_running_requests(config, checkpoint, dtype,
                                         plan.kv_budget_bytes(config, checkpoint, device, dtype))
    port = choose_ports(config.dist).http[0]
    folder = config.run_dir / "engine"
    spec = plan.speed_spec(config, checkpoint, plan.engine_arguments(config, checkpoint, device, dtype, requests, port),
                           folder)
    command = NodeCommand(0, tuple(plan.engine_command(sys.executable, folder)), plan.engine_environment(device),
                          config.dist.hosts[0], port)
    say(f"{config.run_dir}")

    def measure(attempt: Attempt, log: SampleLog) -> Figures:
        attempt.commands = (command,)
        return _measure(config, checkpoint, spec, folder, attempt.environment, log, say)

    with run_directory(config.run_dir):
        attempt = record(config, overrides, measure, checkpoint=replace(checkpoint, dtype_name=dtype))
        tracking.mirror(config.run_dir)
    for line in console.table(attempt.figures) if attempt.figures else [f"  {attempt.status}: {attempt.reason}"]:
        say(line)
    return attempt.outcome(config)


def require_device(config: RunConfig) -> str:
    """Where to measure; raises ConfigError on a CPU that was not asked for, or for what a CPU does not have."""
    device = serving_device(config.server)
    if device == "cpu":
        if config.server.device != "cpu":
            raise ConfigError("task=speed needs an NVIDIA GPU and this machine shows none: give server.device=cpu to "
                              "try it out all the same, with model=tiny_dummy speed=tiny.")
        if config.speed.backend != "auto" or config.quant.kv_cache_dtype != "auto":
            raise ConfigError("a CPU has neither SGLang's fp8 cache nor its GPU backends: leave quant=fp8 and "
                              "speed.backend out.")
    return device


def _measure(config: RunConfig, checkpoint: Checkpoint, spec: SpeedSpec, folder: Path, environment: Environment,
             log: SampleLog, say: Say) -> Figures:
    try:
        result = _run_engine(config, spec, folder, say)
        require_plan(result.kvtuner, config, checkpoint)
        rank = result.kvtuner["ranks"][0]
        log.append(EngineSample("engine", rank["attention"], rank["dtype"], spec.engine, result.kvtuner,
                                result.seconds))
        require_engine(rank, config, spec)
        return figures(result, read_calls(Path(spec.calls_path)), config, _floor(config, checkpoint, spec, environment),
                       spec.engine)
    finally:  # samples remain, whatever they are worth
        for call in read_calls(Path(spec.calls_path)):
            log.append(call)


def _run_engine(config: RunConfig, spec: SpeedSpec, folder: Path, say: Say) -> SpeedResult:
    spec.write(folder / "spec.json")
    log_path = Path(spec.log_path)
    status = run_bounded(plan.engine_command(sys.executable, folder), plan.engine_environment(spec.device),
                         config.speed.timeout_s, log_path, lambda line: say(f"{config.quant.name}: {line}"))
    if not (folder / "result.json").exists():
        raise RunFailed(f"the engine process ended without a result (exit status {status}, bound "
                        f"{config.speed.timeout_s:g} s): see {log_path}.")
    return SpeedResult.read(folder / "result.json")


def _floor(config: RunConfig, checkpoint: Checkpoint, spec: SpeedSpec, environment: Environment) -> Floor:
    gpu = environment.gpus[0] if environment.gpus and spec.device != "cpu" else None
    dtype = spec.engine["dtype"]
    shape = plan.kv_shape(config, checkpoint, dtype)
    kv_bytes = shape.bytes_per_token(config.quant.plan(checkpoint.layers))
    return Floor(peak_of(gpu), checkpoint, ITEMSIZE[dtype], kv_bytes)
