"""The seed report's own figures, as it published them, and what its hardware needs at least."""

from functools import cache, cached_property
from pathlib import Path
from typing import Literal

from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict

from kvtuner_sglang.measure.hardware import PEAKS, Floor, Peak
from kvtuner_sglang.serving.checkpoint import prepare_checkpoint

SEED_REPORT = Path(__file__).with_name("seed_report_2026-02-13.yaml")


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ClaimedTtft(_Row):
    prompt_tokens: int
    mean_ms: float
    min_ms: float
    max_ms: float


class ClaimedThroughput(_Row):
    concurrency: int
    requests_per_s: float
    latency_ms: float
    success: float


class ClaimedMemory(_Row):
    gpu: int
    used_mib: float
    total_mib: float


class Claimed(_Row):
    """seed_report_2026-02-13.yaml; see the comments in it."""

    source: str
    status: Literal["claimed"]
    model: str
    shape: str
    weight_bytes: int
    gpu: str
    tp: int
    pp: int
    node1_port: int
    ttft: tuple[ClaimedTtft, ...]
    throughput: tuple[ClaimedThroughput, ...]
    memory: tuple[ClaimedMemory, ...]

    def ttft_at(self, prompt_tokens: int) -> ClaimedTtft | None:
        return next((row for row in self.ttft if row.prompt_tokens == prompt_tokens), None)

    def throughput_at(self, concurrency: int) -> ClaimedThroughput | None:
        return next((row for row in self.throughput if row.concurrency == concurrency), None)

    @cached_property
    def floor(self) -> Floor:
        """Of its model on its cards by their data sheet: all of them compute at once, those of one stage read."""
        card = PEAKS[self.gpu]
        peak = Peak(self.tp * card.bytes_per_s, self.tp * self.pp * card.flops_per_s, card.source)
        return Floor(peak, prepare_checkpoint(f"dummy:{self.shape}", None), self.weight_bytes, kv_bytes_per_token=0.0)


@cache
def claimed() -> Claimed:
    """The seed report's figures."""
    return Claimed.model_validate(OmegaConf.to_container(OmegaConf.load(SEED_REPORT)))
