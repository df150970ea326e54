"""task=serve: start the servers, run the seed report's three tests, write the record, its mirror and the report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvtuner_sglang.config import RunConfig
from kvtuner_sglang.errors import MeasurementInvalid, RunFailed
from kvtuner_sglang.evidence import sweep, tracking
from kvtuner_sglang.evidence.assemble import assemble, utc_now
from kvtuner_sglang.evidence.environment import collect_environment
from kvtuner_sglang.evidence.outcome import Outcome
from kvtuner_sglang.evidence.record import RunRecord, Status, load_record, write_record
from kvtuner_sglang.evidence.samples import SampleLog
from kvtuner_sglang.measure.seed_tests import Measurements, run_seed_tests
from kvtuner_sglang.report.console import print_summary
from kvtuner_sglang.report.markdown import write_report
from kvtuner_sglang.serving.checkpoint import Checkpoint, prepare_checkpoint
from kvtuner_sglang.serving.cluster import running_cluster
from kvtuner_sglang.serving.commands import NodeCommand
from kvtuner_sglang.tasks.probe import require_probed
from kvtuner_sglang.tasks.run_directory import run_directory

Say = Callable[[str], None]


@dataclass
class _Attempt:
    """What is known of a run so far, whatever ends it."""

    started: str
    status: Status = "failed"
    reason: str | None = None
    commands: tuple[NodeCommand, ...] = ()
    figures: Measurements | None = None


def run(config: RunConfig, overrides: Sequence[str], say: Say) -> Outcome:
    """One run from checkpoint to report. Bad input raises UserError and leaves nothing behind.

    A run that started and broke is an outcome with status failed, or invalid when samples may not count.
    """
    checkpoint = prepare_checkpoint(config.model.source, config.model.path, say)
    if config.quality.probe:
        require_probed(config, checkpoint, say)
    say(f"{config.run_dir}")
    with run_directory(config.run_dir):
        attempt = _Attempt(started=utc_now())
        with SampleLog(config.run_dir) as log:
            _serve_and_measure(attempt, config, checkpoint, log, say)
        record = _record(attempt, config, overrides, checkpoint, log)
        write_record(config.run_dir, record)
        report = write_report(config.run_dir)
        tracking.mirror(config.run_dir)
        say(print_summary(load_record(config.run_dir)))
        say(f"  report      {report}")
    return Outcome(config.run_dir, attempt.status, skipped=False, reason=attempt.reason)


def _serve_and_measure(attempt: _Attempt, config: RunConfig, checkpoint: Checkpoint, log: SampleLog, say: Say) -> None:
    try:
        with running_cluster(config, checkpoint, config.run_dir, say) as cluster:
            attempt.commands = cluster.commands
            attempt.figures = run_seed_tests(cluster, config, checkpoint, say, log.append)
    except MeasurementInvalid as error:
        attempt.status, attempt.reason = "invalid", str(error)
    except RunFailed as error:
        attempt.reason = str(error)
    else:
        attempt.status = "ok"


def _record(attempt: _Attempt, config: RunConfig, overrides: Sequence[str], checkpoint: Checkpoint,
            log: SampleLog) -> RunRecord:
    return assemble(
        config, overrides=overrides, started=attempt.started, status=attempt.status, reason=attempt.reason,
        environment=collect_environment(), samples=log.summary(), group=sweep.current_sweep(),
        commands=attempt.commands, checkpoint=checkpoint,
        figures=attempt.figures if attempt.status == "ok" else None,
    )
