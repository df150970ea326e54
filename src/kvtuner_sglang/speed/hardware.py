"""Below what no time can be: bytes over a GPU's peak bandwidth, FLOPs over its peak arithmetic.

Peaks are NVIDIA's data sheets': HBM or GDDR bandwidth, dense bf16 FLOP/s.
"""

from dataclasses import dataclass

from kvtuner_sglang.serving.checkpoint import Checkpoint

MS_PER_S = 1000.0


@dataclass(frozen=True)
class Peak:
    """bytes_per_s of memory, flops_per_s of dense bf16."""

    bytes_per_s: float
    flops_per_s: float


PEAKS = {  # the first name that is part of what nvidia-smi says
    "H200": Peak(4.8e12, 989.4e12),
    "H100 PCIe": Peak(2.0e12, 756e12),
    "H100 NVL": Peak(3.9e12, 835e12),
    "H100": Peak(3.35e12, 989.4e12),
    "A100-SXM4-80GB": Peak(2.039e12, 312e12),
    "RTX 4090": Peak(1.008e12, 330.3e12),
}


def peak_of(gpu: str | None) -> Peak | None:
    return next((peak for name, peak in PEAKS.items() if gpu is not None and name in gpu), None)


@dataclass(frozen=True)
class Floor:
    """Least times of a model on a GPU; None where the GPU's peaks are not known."""

    peak: Peak | None
    checkpoint: Checkpoint
    weight_itemsize: int
    kv_bytes_per_token: float

    def decode_step_ms(self, batch: int, context: int) -> float | None:
        """Every weight but the embedding, and the keys and values of every request, are read once."""
        if self.peak is None:
            return None
        c = self.checkpoint
        weights = (c.parameters - c.vocab_size * c.hidden_size) * self.weight_itemsize
        return (weights + batch * context * self.kv_bytes_per_token) / self.peak.bytes_per_s * MS_PER_S

    def prefill_ms(self, cached: int, new: int) -> float | None:
        """Two FLOPs a weight and token without embedding and lm_head; four a query channel and visible token."""
        if self.peak is None:
            return None
        c = self.checkpoint
        linear = 2 * (c.parameters - 2 * c.vocab_size * c.hidden_size) * new
        visible = new * cached + new * (new + 1) / 2
        return (linear + 4 * c.layers * c.q_heads * c.head_dim * visible) / self.peak.flops_per_s * MS_PER_S
