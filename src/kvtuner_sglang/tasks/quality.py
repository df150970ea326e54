"""task=quality: one format of one model against full precision, through the real engine, into a record."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from kvtuner_sglang.config import RunConfig
from kvtuner_sglang.evidence import tracking
from kvtuner_sglang.evidence.assemble import Figures
from kvtuner_sglang.evidence.outcome import Outcome
from kvtuner_sglang.evidence.samples import SampleLog
from kvtuner_sglang.measure.memory import kv_record
from kvtuner_sglang.quality.engine_process import engine_command, engine_environment
from kvtuner_sglang.quality.figures import describe, figures, samples
from kvtuner_sglang.quality.measure import Quality, Subject, measure
from kvtuner_sglang.serving.cache_folder import cache_folder
from kvtuner_sglang.serving.checkpoint import Checkpoint, prepare_checkpoint
from kvtuner_sglang.serving.commands import NodeCommand
from kvtuner_sglang.serving.device import serving_device
from kvtuner_sglang.tasks.recorded import Attempt, record, require_plan
from kvtuner_sglang.tasks.run_directory import run_directory

Say = Callable[[str], None]


def run(config: RunConfig, overrides: Sequence[str], say: Say) -> Outcome:
    """Measure and write the record. Bad input raises UserError and leaves nothing behind.

    An engine that broke is an outcome with status failed, figures that may not count one with status invalid.
    """
    checkpoint = prepare_checkpoint(config.model.source, config.model.path, say)
    config.quant.require_fits(checkpoint.identity)
    say(f"{config.run_dir}")
    subject = subject_of(config, checkpoint)

    def measure_it(attempt: Attempt, log: SampleLog) -> Figures:
        quality = _measure(config, subject, say)
        attempt.commands = (_command(quality),)
        require_plan(quality.kvtuner, config, checkpoint)
        for sample in samples(quality):
            log.append(sample)
        return figures(quality, kv_record(quality.kvtuner, config))

    with run_directory(config.run_dir):
        attempt = record(config, overrides, measure_it, checkpoint=replace(checkpoint, dtype_name=subject.dtype))
        tracking.mirror(config.run_dir)
    if attempt.figures is not None:
        describe(attempt.figures.metrics, say)
    else:
        say(f"  {attempt.status}: {attempt.reason}")
    return attempt.outcome(config)


def subject_of(config: RunConfig, checkpoint: Checkpoint) -> Subject:
    """The checkpoint on the device and in the precision that the configuration asks for."""
    device = serving_device(config.server)
    own = config.model.dtype_cpu if device == "cpu" else config.model.dtype_cuda
    dtype = own if config.quality.dtype == "model" else config.quality.dtype
    return Subject(checkpoint.path, checkpoint.sha256, device, dtype, config.server.attention)


def _measure(config: RunConfig, subject: Subject, say: Say) -> Quality:
    return measure(subject, config.quant, config.quality, seed=config.seed,
                   chunked_prefill_tokens=config.server.chunked_prefill_tokens,
                   work_dir=config.run_dir / "engine", cache_dir=cache_folder("quality"), say=say)


def _command(quality: Quality) -> NodeCommand:
    folder = Path(quality.spec.out_dir)
    argv = engine_command(folder / "spec.json", folder / "result.json")
    return NodeCommand(0, tuple(argv), engine_environment(quality.spec.device), "127.0.0.1", quality.spec.port)
