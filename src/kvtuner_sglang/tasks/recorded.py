"""The frame of every task that leaves a record: however the measuring ends, its samples and one record remain."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvtuner_sglang.config import RunConfig
from kvtuner_sglang.errors import MeasurementInvalid, RunFailed
from kvtuner_sglang.evidence import sweep
from kvtuner_sglang.evidence.assemble import Figures, assemble, utc_now
from kvtuner_sglang.evidence.environment import collect_environment
from kvtuner_sglang.evidence.outcome import Outcome
from kvtuner_sglang.evidence.record import Environment, Status, write_record
from kvtuner_sglang.evidence.samples import SampleLog
from kvtuner_sglang.quant import format_hash
from kvtuner_sglang.serving import logs
from kvtuner_sglang.serving.checkpoint import Checkpoint
from kvtuner_sglang.serving.commands import NodeCommand


@dataclass
class Attempt:
    """What is known of a run so far, whatever ends it; figures exactly when status is ok.

    The environment is that of the start, whose commit the running code is.
    """

    status: Status = "failed"
    reason: str | None = None
    commands: tuple[NodeCommand, ...] = ()
    figures: Figures | None = None
    started: str = field(default_factory=utc_now)
    environment: Environment = field(default_factory=collect_environment)

    def outcome(self, config: RunConfig) -> Outcome:
        return Outcome(config.run_dir, self.status, skipped=False, reason=self.reason)


def record(config: RunConfig, overrides: Sequence[str], measure: Callable[[Attempt, SampleLog], Figures], *,
           checkpoint: Checkpoint | None) -> Attempt:
    """Measure inside run_directory and write the record.

    `measure` says in the attempt which commands it ran, and logs samples as they come.  MeasurementInvalid makes the
    run invalid, RunFailed failed, or oom if a node's log says so; anything else is raised, and leaves no record.
    """
    attempt = Attempt()
    with SampleLog(config.run_dir) as log:
        try:
            attempt.figures = measure(attempt, log)
        except MeasurementInvalid as error:
            attempt.status, attempt.reason = "invalid", str(error)
        except RunFailed as error:
            said = [line for log in sorted(config.run_dir.glob("logs/*.log")) if (line := logs.out_of_memory(log))]
            attempt.status, attempt.reason = ("oom", f"{error} ({said[0]})") if said else ("failed", str(error))
        else:
            attempt.status = "ok"
    write_record(config.run_dir, assemble(
        config, overrides=overrides, started=attempt.started, status=attempt.status, reason=attempt.reason,
        environment=attempt.environment, samples=log.summary(), group=sweep.current_sweep(),
        commands=attempt.commands, checkpoint=checkpoint, figures=attempt.figures,
    ))
    return attempt


def require_plan(kvtuner: dict[str, object], config: RunConfig, checkpoint: Checkpoint) -> None:
    """Raise MeasurementInvalid unless the engine's own report is of the format asked for."""
    asked = format_hash(config.quant.plan(checkpoint.layers))
    if kvtuner["plan_hash"] != asked:
        raise MeasurementInvalid(f"same_format: the engine serves plan {kvtuner['plan_hash']} instead of {asked}: "
                                 "reinstall kvtuner-sglang.")
    if config.quant.enabled and kvtuner["page_size"] != config.quant.page_tokens:
        raise MeasurementInvalid(f"same_format: the engine has pages of {kvtuner['page_size']} tokens instead of "
                                 f"{config.quant.page_tokens}: reinstall kvtuner-sglang.")
