"""Below what no time can be: bytes over peak bandwidth, FLOPs over peak arithmetic.

PEAKS has what NVIDIA's data sheets promise of a card; measure/roofline.py measures the machine that a run is on.
"""

from dataclasses import dataclass
from typing import Protocol

MS_PER_S = 1000.0
GEMM_FLOPS = 2  # a weight and token: one multiplication, one addition


@dataclass(frozen=True)
class Peak:
    """bytes_per_s of memory, flops_per_s of dense 16-bit arithmetic; `source`: where the figures stand."""

    bytes_per_s: float
    flops_per_s: float
    source: str


H100_SHEET = "NVIDIA H100 Tensor Core GPU data sheet, bf16 without sparsity"
PEAKS = {  # the first name that is part of what nvidia-smi says
    "H200": Peak(4.8e12, 989.4e12, "NVIDIA H200 Tensor Core GPU data sheet, bf16 without sparsity"),
    "H100 PCIe": Peak(2.0e12, 756e12, H100_SHEET),
    "H100 NVL": Peak(3.9e12, 835e12, H100_SHEET),
    "H100": Peak(3.35e12, 989.4e12, H100_SHEET),
    "A100-SXM4-80GB": Peak(2.039e12, 312e12, "NVIDIA A100 Tensor Core GPU data sheet, bf16 without sparsity"),
    # bf16, which accumulates in fp32, has half of this: the faster mode makes the floor lower, never wrong
    "RTX 4090": Peak(1.008e12, 330.3e12, "NVIDIA Ada GPU Architecture white paper 2.01, appendix A: fp16 with fp16 "
                                         "accumulation, without sparsity"),
}


def peak_of(gpu: str | None) -> Peak | None:
    return next((peak for name, peak in PEAKS.items() if gpu is not None and name in gpu), None)


class Decoder(Protocol):
    """What the floor needs of a model; `parameters` counts the embedding and an lm_head of its own."""

    @property
    def layers(self) -> int: ...
    @property
    def q_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def parameters(self) -> int: ...


@dataclass(frozen=True)
class Floor:
    """Least times of a model on its hardware, `peak` that of all of it; None where the peaks are not known."""

    peak: Peak | None
    checkpoint: Decoder
    weight_itemsize: int
    kv_bytes_per_token: float

    def decode_step_ms(self, batch: int, context: int) -> float | None:
        """Every weight but the embedding, and the keys and values of every request, are read once."""
        if self.peak is None:
            return None
        return (self._weight_bytes + batch * context * self.kv_bytes_per_token) / self.peak.bytes_per_s * MS_PER_S

    def prefill_ms(self, cached: int, new: int) -> float | None:
        """The longer of two: the arithmetic, and reading every weight but the embedding once.

        Two FLOPs a weight and token without the embedding, lm_head for the last token alone; four FLOPs a query channel
        and visible token.
        """
        if self.peak is None:
            return None
        c = self.checkpoint
        head = c.vocab_size * c.hidden_size
        visible = new * cached + new * (new + 1) / 2
        linear = GEMM_FLOPS * ((c.parameters - 2 * head) * new + head)
        attention = 2 * GEMM_FLOPS * c.layers * c.q_heads * c.head_dim * visible
        return max((linear + attention) / self.peak.flops_per_s, self._weight_bytes / self.peak.bytes_per_s) * MS_PER_S

    @property
    def _weight_bytes(self) -> int:
        c = self.checkpoint
        return (c.parameters - c.vocab_size * c.hidden_size) * self.weight_itemsize
