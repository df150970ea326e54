"""The table a sweep ends with: one row per job, from the jobs' own records.

Hydra meets this file only through `SweepCallback`, named in conf/config.yaml.  No engine is imported: a sweep whose
jobs are all finished costs seconds.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from kvtuner_sglang.display_width import display_width, ljust
from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.load_level import summary_level
from kvtuner_sglang.evidence.outcome import Outcome
from kvtuner_sglang.evidence.record import RunRecord, load_record, write_atomically

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("job", "quant", "dist", "status", "KV tokens", "effective bits", "bytes/token", "load", "TTFT p50 (ms)",
           "output tok/s", "retractions", "capacity (req/s)", "reason")
WHERE_ANY = ("load", "TTFT p50 (ms)", "output tok/s", "retractions", "capacity (req/s)")  # of some workloads alone


@dataclass(frozen=True)
class SweepJob:
    """One job: its words on the command line, and its record or why there is none."""

    name: str
    record: RunRecord | None
    skipped: bool = False
    reason: str | None = None
    ended: str | None = None  # how a task without a record ended

    @property
    def status(self) -> str:
        return self.ended or (self.record.status if self.record else "failed")


def job_of(outcome: Outcome, name: str) -> SweepJob:
    """The job behind an outcome; one that should have left a record and did not is failed, with the reason."""
    if outcome.run_dir is None:
        return SweepJob(name, None, outcome.skipped, outcome.reason, outcome.status)
    try:
        return SweepJob(name, load_record(outcome.run_dir), outcome.skipped, outcome.reason)
    except UserError as error:
        return SweepJob(name, None, outcome.skipped, outcome.reason or str(error))


def table(jobs: Iterable[SweepJob]) -> "pd.DataFrame":
    """One row per job; what a job does not have is None, a column of WHERE_ANY that no job has is left out.

    bytes/token sums over all ranks.  A load's figures are those of its summary_level.
    """
    import pandas as pd

    columns, rows = _cells(jobs)
    return pd.DataFrame(rows, columns=columns, dtype=object)


def _cells(jobs: Iterable[SweepJob]) -> tuple[list[str], list[list[Any]]]:
    rows = [_row(job) for job in jobs]
    columns = [name for name in COLUMNS if name not in WHERE_ANY or any(row.get(name) is not None for row in rows)]
    return columns, [[row.get(name) for name in columns] for row in rows]


def _row(job: SweepJob) -> dict[str, Any]:
    record = job.record
    row = {"job": job.name, "status": job.status + (" (done before)" if job.skipped else ""),
           "reason": job.reason or (record.reason if record else None)}
    if record is None:
        return row
    row |= {"quant": record.config["quant"]["name"], "dist": record.config["dist"]["name"]}
    if record.kv is None:
        return row
    allocated = sum(rank.bytes_per_token_allocated for rank in record.kv.ranks)
    return row | {"KV tokens": record.kv.tokens, "effective bits": round(record.kv.effective_bits, 3),
                  "bytes/token": round(allocated, 1), **_figures(record)}


def _figures(record: RunRecord) -> dict[str, Any]:
    if where := summary_level(record):
        capacity = record.metrics.get("capacity_per_s")
        return {"load": where, "TTFT p50 (ms)": round(record.metrics[f"ttft_ms/{where}"].p50, 1),
                "output tok/s": round(record.metrics[f"output_tokens_per_s/{where}"].mean, 1),
                "retractions": round(record.metrics[f"retractions/{where}"].mean, 2),
                "capacity (req/s)": round(capacity.mean, 3) if capacity else None}
    return {"TTFT p50 (ms)": _last(record, "ttft_ms", "prompt_tokens", "p50"),
            "output tok/s": _last(record, "output_tokens_per_s", "concurrency", "mean")}


def _last(record: RunRecord, name: str, label: str, statistic: str) -> float | None:
    """The metric at its highest level: the longest prompt, the most requests at once."""
    levels = record.levels(name, label)
    return round(getattr(record.metric(name, **{label: levels[-1]}), statistic), 1) if levels else None


def summary_table(jobs: Sequence[SweepJob]) -> str:
    """The table as Markdown, which is also how the console shows it."""
    columns, rows = _cells(jobs)
    return markdown_table(columns, [["" if value is None else str(value) for value in row] for row in rows])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table padded so that it reads as plain text, too."""
    cells = [list(header), *([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)]
    widths = [max(display_width(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(ljust(cell, width) for cell, width in zip(row, widths, strict=True)) + " |"
             for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def write_summary(directory: Path, jobs: Sequence[SweepJob]) -> Path:
    """Write summary.md and summary.csv into the sweep's directory; returns the former."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "summary.md"
    write_atomically(path, f"# Sweep {directory.name}\n\n{summary_table(jobs)}\n")
    write_atomically(directory / "summary.csv", table(jobs).to_csv(index=False))
    return path


class SweepCallback(Callback):
    """Collects the jobs of one multirun; at its end prints their table and keeps it in runs_dir/sweeps/<id>/."""

    current: ClassVar[str | None] = None  # the sweep in progress in this process

    def __init__(self) -> None:
        self.jobs: list[SweepJob] = []

    def on_multirun_start(self, config: DictConfig, **_kwargs: Any) -> None:
        self.jobs = []
        SweepCallback.current = datetime.now(UTC).strftime("%Y-%m-%d_%H-%M-%S")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_kwargs: Any) -> None:
        if SweepCallback.current is None:
            return  # a single run prints its own summary
        if job_return.status is JobStatus.COMPLETED:  # a job that raised ends the sweep with Hydra's own message
            self.jobs.append(job_of(job_return.return_value, " ".join(job_return.overrides or ()) or "defaults"))

    def on_multirun_end(self, config: DictConfig, **_kwargs: Any) -> None:
        if SweepCallback.current is None:
            raise RuntimeError("a sweep ended that never started")
        path = write_summary(Path(config.runs_dir) / "sweeps" / SweepCallback.current, self.jobs)
        SweepCallback.current = None
        sys.stdout.write(f"\n{summary_table(self.jobs)}\n\n{path}\n")
        sys.stdout.flush()


def current_sweep() -> str | None:
    """Id of the sweep that this process is in the middle of, which groups its runs in W&B; None for a single run."""
    return SweepCallback.current
