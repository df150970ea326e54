"""One W&B run from one record: configuration, metrics, tables, a figure, and the run directory as an artifact.

    python -m kvtuner_sglang.evidence.wandb_run RUN_DIR        # started by evidence.tracking
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtuner_sglang.evidence.metric_figure import metric_figure
from kvtuner_sglang.evidence.record import RunRecord, load_record
from kvtuner_sglang.evidence.tracking import TRACKING_LOG
from kvtuner_sglang.figure_style import save

if TYPE_CHECKING:
    import wandb

WANDB_FOLDER = "wandb"  # in the run directory: what W&B itself writes
FIGURE = "metrics"
STATISTICS = ("n", "mean", "p50", "p90", "p99", "min", "max")


def flat_metrics(record: RunRecord) -> dict[str, float]:
    """{"ttft_ms/prompt_tokens=10/p50": 81.2, ...}, with the capacity beside it, as W&B shows it."""
    flat = {f"{key}/{name}": getattr(metric, name) for key, metric in record.metrics.items() for name in STATISTICS}
    if record.kv is not None:
        flat |= {"kv/tokens": record.kv.tokens, "kv/effective_bits": record.kv.effective_bits}
    return flat


def tables(record: RunRecord) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """{name: (columns, rows)}: every metric, and every rank's part of the KV cache if there is one."""
    metrics = [[key, metric.unit, *(getattr(metric, name) for name in STATISTICS)]
               for key, metric in record.metrics.items()]
    found = {"metrics": (["metric", "unit", *STATISTICS], metrics)} if metrics else {}
    if record.kv is not None:
        ranks = [rank.model_dump(mode="json") for rank in record.kv.ranks]
        found["kv_ranks"] = (list(ranks[0]), [[str(value) for value in rank.values()] for rank in ranks])
    return found


def log_to_wandb(run_dir: Path) -> None:
    """Write one W&B run; sweeps are its groups, tasks its job types."""
    import wandb  # here, because a missing or broken W&B must fail only this process

    record = load_record(run_dir)
    (run_dir / WANDB_FOLDER).mkdir(exist_ok=True)
    with wandb.init(
        project=record.config["tracking"]["project"], dir=str(run_dir), mode=record.tracking.mode, name=record.name,
        group=record.tracking.group, job_type=record.config["task"],
        config={**record.config, "config_hash": record.config_hash, "git_sha": record.environment.git_sha},
        settings=wandb.Settings(console="off", x_disable_stats=True, x_disable_meta=True),
    ) as run:
        run.summary.update({"status": record.status, "reason": record.reason, **flat_metrics(record)})
        shown: dict[str, Any] = {name: wandb.Table(columns=columns, data=rows)
                                 for name, (columns, rows) in tables(record).items()}
        if (figure := metric_figure(record)) is not None:
            paths = save(figure, run_dir / WANDB_FOLDER, FIGURE)
            shown[f"{FIGURE}_figure"] = wandb.Image(str(paths[-1]))
        if shown:
            run.log(shown)
        run.log_artifact(artifact(run_dir, record.name))


def artifact(run_dir: Path, name: str) -> "wandb.Artifact":
    """The run directory but for W&B's own files; its record says of the mirror that it is pending."""
    import wandb

    found = wandb.Artifact(name=name, type="run")
    for path in sorted(run_dir.rglob("*")):
        inside = path.relative_to(run_dir)
        if path.is_file() and inside.parts[0] not in (WANDB_FOLDER, TRACKING_LOG):
            found.add_file(str(path), name=str(inside))
    return found


if __name__ == "__main__":
    log_to_wandb(Path(sys.argv[1]))
