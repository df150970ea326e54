"""Puts a run's parts together into its record."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from kvtuner_sglang.config import RunConfig
from kvtuner_sglang.evidence.environment import busy_warnings
from kvtuner_sglang.evidence.record import (
    DeviceMemory,
    Environment,
    KVRecord,
    Metric,
    ModelRecord,
    NodeCommandRecord,
    RunRecord,
    SamplesFile,
    Status,
    Tracking,
    Verdict,
)

if TYPE_CHECKING:
    from kvtuner_sglang.serving.checkpoint import Checkpoint
    from kvtuner_sglang.serving.commands import NodeCommand

TIMED = ("serve", "forensics", "speed")  # tasks whose figures are times in which a CPU has a part


@dataclass(frozen=True)
class Figures:
    """What a valid run of any task found; `warnings` are oddities that do not make it invalid, `rules` what held.

    verdicts: what is asked of the code, which a valid run may miss.
    """

    metrics: dict[str, Metric]
    rules: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    kv: KVRecord | None = None
    memory: tuple[DeviceMemory, ...] = ()
    verdicts: tuple[Verdict, ...] = ()


def utc_now() -> str:
    """The time as records write it: ISO 8601, UTC, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def assemble(config: RunConfig, *, overrides: Sequence[str], started: str, status: Status, reason: str | None,
             environment: Environment, samples: SamplesFile, group: str | None,
             commands: "Sequence[NodeCommand]" = (), checkpoint: "Checkpoint | None" = None,
             figures: Figures | None = None) -> RunRecord:
    """The record of a run that ends now.

    `reason` says why status is not ok; `figures` must be given exactly when it is, or pydantic's ValidationError is
    raised.  `group` is the sweep's id, None outside one.
    """
    missing = {"reason": "the run is ok"} if reason is None else {}
    if config.task == "kernels":
        missing |= dict.fromkeys(("model", "kv"), "kernels are timed without a model or an engine")
    elif checkpoint is None:
        missing["model"] = "the run ended before its checkpoint was ready"
    if config.task == "tune":
        missing["kv"] = "plans are scored without an engine"
    if figures is None:
        missing["kv"] = f"the run is {status}, so it carries no figures"
    busy = busy_warnings(environment) if config.task in TIMED else ()
    return RunRecord(
        name=config.run_dir.name, status=status, reason=reason, config=config.to_dict(),
        config_hash=config.config_hash, overrides=tuple(overrides),
        commands=tuple(_command(command) for command in commands), environment=environment,
        model=_model(config, checkpoint) if checkpoint else None,
        kv=figures.kv if figures else None, metrics=figures.metrics if figures else {},
        memory=figures.memory if figures else (), rules=figures.rules if figures else (),
        warnings=(*busy, *figures.warnings) if figures else (), verdicts=figures.verdicts if figures else (),
        samples=samples, started=started, ended=utc_now(), seed=config.seed,
        tracking=Tracking(mode=config.tracking.mode, status="pending", group=group), unknown=missing,
    )


def _command(command: "NodeCommand") -> NodeCommandRecord:
    return NodeCommandRecord(node_rank=command.node_rank, host=command.host, http_port=command.http_port,
                             argv=command.argv, environment=command.environment)


def _model(config: RunConfig, checkpoint: "Checkpoint") -> ModelRecord:
    return ModelRecord(
        name=config.model.name, source=checkpoint.source, sha256=checkpoint.sha256,
        architecture=checkpoint.architecture, layers=checkpoint.layers, q_heads=checkpoint.q_heads,
        kv_heads=checkpoint.kv_heads, head_dim=checkpoint.head_dim, parameters=checkpoint.parameters,
        dtype=checkpoint.dtype_name,
    )
