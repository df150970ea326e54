"""task=tune: a plan of bits per layer for one model, its comparison with other plans, and its report, into a record."""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from kvtuner_sglang.config import RunConfig
from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.evidence import tracking
from kvtuner_sglang.evidence.assemble import Figures
from kvtuner_sglang.evidence.environment import PROJECT_ROOT
from kvtuner_sglang.evidence.outcome import Outcome
from kvtuner_sglang.evidence.record import Environment
from kvtuner_sglang.evidence.samples import SampleLog
from kvtuner_sglang.plugin.arguments import SUPPORTED_ARCHITECTURES
from kvtuner_sglang.quant.plan_file import ModelIdentity
from kvtuner_sglang.serving.cache_folder import cache_folder, one_at_a_time
from kvtuner_sglang.serving.checkpoint import Checkpoint, prepare_checkpoint
from kvtuner_sglang.serving.commands import NodeCommand
from kvtuner_sglang.serving.device import serving_device
from kvtuner_sglang.tasks.recorded import Attempt, record
from kvtuner_sglang.tasks.run_directory import run_directory
from kvtuner_sglang.tuner.figures import write_figures
from kvtuner_sglang.tuner.menu import Menu
from kvtuner_sglang.tuner.metrics import figures
from kvtuner_sglang.tuner.plan import write_tuned_plan
from kvtuner_sglang.tuner.report import write_report
from kvtuner_sglang.tuner.run import Tuned, load_bench, samples, tune_model

Say = Callable[[str], None]
STUDY_FILE = "study.db"


def run(config: RunConfig, overrides: Sequence[str], say: Say) -> Outcome:
    """Search, compare and write plan, record, report and figures. Bad input raises UserError and leaves nothing behind.

    A search that was killed goes on where it was: its scores and its study are in the cache, the study until it is
    finished.  force=true begins with neither.
    """
    device = serving_device(config.server)
    checkpoint = prepare_checkpoint(config.model.source, config.model.path, say)
    if checkpoint.architecture not in SUPPORTED_ARCHITECTURES:
        raise ConfigError(f"architecture {checkpoint.architecture} is none that plans are served for, and its layers "
                          f"may do what the tuner does not: use one of {', '.join(SUPPORTED_ARCHITECTURES)}.")
    Menu(config.tune.keys, config.tune.values, checkpoint.head_dim, config.tune.page_size).require_within(
        config.tune.bits)
    say(f"{config.run_dir}")

    def measure(attempt: Attempt, log: SampleLog) -> Figures:
        attempt.commands = (_command(overrides),)
        tuned = _tune(config, checkpoint, device, attempt.environment, say)
        for sample in samples(tuned):
            log.append(sample)
        write_tuned_plan(config.run_dir, tuned, _identity(config, checkpoint), attempt.environment, config.tune)
        return figures(tuned)

    with run_directory(config.run_dir):
        attempt = record(config, overrides, measure, checkpoint=checkpoint)
        if attempt.figures is not None:
            write_figures(config.run_dir)
            write_report(config.run_dir)
        tracking.mirror(config.run_dir)
    say(f"  {attempt.status}: {attempt.reason or config.run_dir / 'report.md'}")
    return attempt.outcome(config)


def _tune(config: RunConfig, checkpoint: Checkpoint, device: str, environment: Environment, say: Say) -> Tuned:
    bench = load_bench(checkpoint, config.tune, device, environment, cache_folder("tune"))
    study = bench.study(config.config_hash)
    with one_at_a_time(study.with_suffix(".lock"), lambda: say("another process tunes the same; waiting")):
        if config.force:
            study.unlink(missing_ok=True)
            bench.scores.unlink(missing_ok=True)
        tuned = tune_model(bench, _identity(config, checkpoint), config.tune, config.seed, study, say)
        shutil.move(study, config.run_dir / STUDY_FILE)
    return tuned


def _identity(config: RunConfig, checkpoint: Checkpoint) -> ModelIdentity:
    return ModelIdentity(checkpoint.architecture, checkpoint.layers, checkpoint.kv_heads, checkpoint.head_dim,
                         config.model.name, checkpoint.sha256)


def _command(overrides: Sequence[str]) -> NodeCommand:
    """All of it runs in this process; its words as they are typed in the project's folder."""
    script = Path("run.py") if (PROJECT_ROOT / "run.py").exists() else Path(sys.argv[0])
    return NodeCommand(0, ("python", str(script), *overrides), {}, "127.0.0.1", 0)
