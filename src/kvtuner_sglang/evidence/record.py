"""record.json: everything one run says about itself, as one typed model that refuses half a truth.

What is unknown is null and has a reason in `unknown`; a run whose status is not ok carries no figure at all.  The
record is the truth; report.md, W&B, figures and tables are drawn from it.
"""

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvtuner_sglang.errors import UserError

RECORD_FILE = "record.json"
Status = Literal["ok", "failed", "invalid", "oom"]


class Explained(BaseModel):
    """A model whose null fields each have a reason in `unknown`: {field: why it is not known}."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    unknown: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _null_has_a_reason(self) -> Self:
        null = {name for name in type(self).model_fields if getattr(self, name) is None}
        if null != self.unknown.keys():
            wrong = ", ".join(sorted(null ^ self.unknown.keys()))
            raise ValueError(f"every null field, and no other, needs a reason in `unknown`: {wrong}")
        if not all(self.unknown.values()):
            raise ValueError("a reason in `unknown` is empty")
        return self


class Metric(BaseModel):
    """Summary of `n` values in `unit`; percentiles interpolate linearly, so p99 of few values is close to their max.

    ci95: Student's 95 % interval of the mean, where the values are one per repeat.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    unit: str
    n: int = Field(gt=0)
    mean: float
    p50: float
    p90: float
    p99: float
    min: float
    max: float
    ci95: tuple[float, float] | None = Field(default=None, exclude_if=lambda interval: interval is None)


class NodeCommandRecord(BaseModel):
    """How one node was started: the whole command line and what was added to the environment."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    node_rank: int
    host: str
    http_port: int
    argv: tuple[str, ...]
    environment: dict[str, str]


class ModelRecord(BaseModel):
    """The checkpoint: where it is from, what it is (sha256 of its weights) and its shape."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    source: str
    sha256: str
    architecture: str
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    parameters: int
    dtype: str


class RankRecord(BaseModel):
    """One rank's KV pool as the engine allocated it; `layers` is (first, one past the last); bytes are bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    rank: int
    tp_rank: int
    pp_rank: int
    node_rank: int
    host: str
    pid: int
    device: str
    pool_class: str
    attention: str = "not recorded"  # of runs from before there was a choice
    layers: tuple[int, int]
    kv_heads: int
    tokens: int
    pool_bytes: int
    tail_bytes: int
    bytes_per_token_formula: float
    bytes_per_token_allocated: float
    bytes_per_token_full: float


class KVRecord(Explained):
    """What the KV cache of the run holds.

    tokens: capacity as the engine reports it.  full_precision_tokens: what the same bytes would hold in the model's
    own precision, by formula; capacity_ratio = tokens / full_precision_tokens.
    """

    format: str
    enabled: bool
    plan_hash: str
    page_size: int
    tokens: int
    effective_bits: float
    budget_bytes_per_rank: int | None
    full_precision_dtype: str
    full_precision_tokens: int | None
    capacity_ratio: float | None
    package_version: str
    sglang_version: str
    ranks: tuple[RankRecord, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _ratio_is_of_its_tokens(self) -> Self:
        if self.full_precision_tokens and self.capacity_ratio != self.tokens / self.full_precision_tokens:
            raise ValueError(f"capacity_ratio is {self.capacity_ratio}, not tokens / full_precision_tokens")
        return self


class DeviceMemory(Explained):
    """Used and total MiB: of a GPU by nvidia-smi, or, on CPU, a rank's resident memory and the host's RAM."""

    name: str
    node_rank: int | None
    used_mib: float | None
    total_mib: float | None
    source: str


class Environment(Explained):
    """Where and with what the run ran.

    git_dirty: whether anything but results (runs/, paper/) differed from the commit; in older runs anything at all.
    load_average: processes that wanted a core, over 1, 5 and 15 minutes before the start; empty in runs from before it
    was recorded.  cpu_busy_percent: of all cores, at work in the moment before the start, when nothing of the run was;
    0 in runs from before it was recorded.
    """

    host: str
    os: str
    python: str
    git_sha: str | None
    git_dirty: bool | None
    lock_file: str | None
    lock_sha256: str | None
    packages: dict[str, str | None]
    cpu: str
    cpu_cores: int
    ram_mib: int
    load_average: tuple[float, ...] = ()
    cpu_busy_percent: float = 0.0
    gpus: tuple[str, ...] | None
    gpu_driver: str | None
    gpu_clocks: str | None
    gpu_topology: str | None
    cuda: str | None

    @property
    def hardware(self) -> str:
        """What computed, without the host's name: "4 x NVIDIA H100 80GB HBM3"."""
        if not self.gpus:
            return f"{self.cpu}, {self.cpu_cores} cores"
        return ", ".join(f"{n} x {name}" if n > 1 else name for name, n in Counter(self.gpus).items())

    @property
    def auto_device(self) -> str:
        """What server.device=auto finds there."""
        return "cuda" if self.gpus else "cpu"

    @property
    def machine(self) -> str:
        """What must be equal for two runs to be comparable."""
        return f"{self.host}: {self.hardware}"


class SamplesFile(BaseModel):
    """The samples beside the record, every one that was taken."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    file: str
    count: int
    sha256: str


class Tracking(BaseModel):
    """Whether the W&B mirror has the run: pending until it was tried; `reason` says why it failed."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    mode: Literal["offline", "online", "disabled"]
    status: Literal["pending", "ok", "failed", "disabled"]
    reason: str | None = None
    group: str | None = None


class Verdict(BaseModel):
    """Something that is asked of the code, with the figure that was measured, and whether it held."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    held: bool
    what: str


class RunRecord(Explained):
    """One run. `started` and `ended` are ISO 8601 in UTC; `overrides` are the words given to run.py.

    rules: the validity rules that held, a sentence each.  warnings: oddities that do not make a run invalid.
    verdicts: what is asked of what was measured, by its samples; empty in runs from before they were recorded.
    """

    schema_version: Literal[1] = 1
    name: str
    status: Status
    reason: str | None
    config: dict[str, Any]
    config_hash: str
    overrides: tuple[str, ...]
    commands: tuple[NodeCommandRecord, ...]
    environment: Environment
    model: ModelRecord | None
    kv: KVRecord | None
    metrics: dict[str, Metric]
    memory: tuple[DeviceMemory, ...]
    rules: tuple[str, ...]
    warnings: tuple[str, ...]
    verdicts: tuple[Verdict, ...] = ()
    samples: SamplesFile
    started: str
    ended: str
    seed: int
    tracking: Tracking

    @model_validator(mode="after")
    def _only_ok_has_figures(self) -> Self:
        if self.status == "ok":
            served = self.config.get("task") not in ("kernels", "tune")  # these measure without an engine
            if not self.metrics or not self.rules or (served and self.kv is None):
                raise ValueError("a run with status ok needs metrics, the rules that held and, if it served, kv")
            return self
        if self.metrics or self.memory or self.rules or self.verdicts or self.kv is not None:
            raise ValueError(f"a run with status {self.status} carries no metrics, memory, rules, verdicts or kv")
        if self.reason is None:
            raise ValueError(f"a run with status {self.status} needs a reason")
        return self

    @property
    def floor_ms(self) -> float | None:
        """The bound of validity on a decode step, by what its machine measured of itself; None if it is not known."""
        floor = self.metrics.get("tpot_floor_ms")
        return floor.mean if floor else None

    def measured_apart(self, other: "RunRecord") -> bool:
        """Whether a run of the same model and layout ran on another machine of the kind, so that times do not compare.

        A machine measures itself before its first run and keeps that; one that lost it counts as another.
        """
        return None not in (self.floor_ms, other.floor_ms) and self.floor_ms != other.floor_ms

    def metric(self, name: str, **at: float | str) -> Metric:
        """The metric `name` at, say, prompt_tokens=1000; raises KeyError if the run did not measure it."""
        return self.metrics[metric_key(name, **at)]

    def levels(self, name: str, label: str) -> list[int]:
        """The values of `label`, ascending, at which metric `name` was measured."""
        prefix = f"{name}/{label}="
        return sorted(int(key.removeprefix(prefix)) for key in self.metrics if key.startswith(prefix))


def metric_key(name: str, **at: float | str) -> str:
    """ "ttft_ms/prompt_tokens=1000": the name, with its unit, and where it was measured."""
    return name + "".join(f"/{label}={value}" for label, value in at.items())


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old one or the whole new one."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_record(run_dir: Path, record: RunRecord) -> Path:
    """Write, or replace, run_dir/record.json atomically."""
    path = run_dir / RECORD_FILE
    write_atomically(path, record.model_dump_json(indent=1) + "\n")
    return path


def load_record(run_dir: Path) -> RunRecord:
    """Read run_dir/record.json; raises UserError if it is missing or not a record of this schema."""
    path = run_dir / RECORD_FILE
    try:
        return RunRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{run_dir} holds no {RECORD_FILE}: run it first.") from error
    except ValidationError as error:
        raise UserError(f"{path} is not a record of this schema ({error.error_count()} errors): "
                        "repeat the run with force=true.") from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
