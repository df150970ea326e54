"""How far quantized logits are from full-precision ones, token by token, and what an average of that is worth.

All sums are float64.  Rows are taken in slices, so memory stays below 2 GB for vocabularies of 152,000.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
import torch

from kvtuner_sglang.errors import MeasurementInvalid

ROWS_AT_ONCE = 128
BLOCK_TOKENS = 100
Z95 = 1.959964


@dataclass(frozen=True)
class TokenRows:
    """One value per position of a window, float64 arrays of equal length.

    kl: KL(full || quantized) in nats.  agree: 1 where both put the same token first.  nll_full, nll: negative
    log-probability, in nats, of the token that follows; NaN at the last position, which none follows.
    """

    kl: np.ndarray
    agree: np.ndarray
    nll_full: np.ndarray
    nll: np.ndarray

    @staticmethod
    def joined(parts: Sequence["TokenRows"]) -> "TokenRows":
        return TokenRows(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(TokenRows)))

    @property
    def perplexity(self) -> float:
        return float(np.exp(np.nanmean(self.nll)))

    @property
    def perplexity_full(self) -> float:
        return float(np.exp(np.nanmean(self.nll_full)))


@dataclass(frozen=True)
class Mean:
    """A mean, its standard error and what it was taken over."""

    value: float
    standard_error: float
    n: int

    @property
    def interval95(self) -> tuple[float, float]:
        """Normal approximation: mean -/+ 1.96 standard errors."""
        return self.value - Z95 * self.standard_error, self.value + Z95 * self.standard_error


Logits: TypeAlias = "np.ndarray | torch.Tensor"


def compare_logits(full: Logits, quantized: Logits, tokens: Sequence[int], device: str = "cpu") -> TokenRows:
    """Compare two (rows, vocabulary) arrays of logits whose row i follows token i of `tokens`; on `device`.

    Raises MeasurementInvalid if a shape is not (len(tokens), vocabulary) or a logit is not finite.
    """
    if full.shape != quantized.shape or full.shape[0] != len(tokens):
        raise MeasurementInvalid(f"logits of shape {full.shape} and {quantized.shape} do not belong to "
                                 f"{len(tokens)} tokens: measure again.")
    following = torch.tensor([*tokens[1:], 0], device=device)
    parts = []
    for low in range(0, len(tokens), ROWS_AT_ONCE):
        rows = slice(low, low + ROWS_AT_ONCE)
        parts.append(_compare_slice(full[rows], quantized[rows], following[rows], device))
    kl, agree, nll_full, nll = (np.concatenate(column) for column in zip(*parts, strict=True))
    nll_full[-1] = nll[-1] = math.nan
    return TokenRows(kl, agree, nll_full, nll)


def _compare_slice(full: Logits, quantized: Logits, following: torch.Tensor, device: str) -> tuple[np.ndarray, ...]:
    both = (x if isinstance(x, torch.Tensor) else torch.from_numpy(np.array(x)) for x in (full, quantized))
    p, q = (x.to(device).double().log_softmax(-1) for x in both)
    if not (torch.isfinite(p).all() and torch.isfinite(q).all()):
        raise MeasurementInvalid("a logit is not a finite number: the server computed garbage, so measure again.")
    agree = (p.argmax(-1) == q.argmax(-1)).double()
    nll_full, nll = (-x.gather(-1, following[:, None])[:, 0] for x in (p, q))
    kl = (p.exp() * (p - q)).sum(-1)
    return tuple(x.cpu().numpy() for x in (kl, agree, nll_full, nll))


def block_mean(values: np.ndarray, block: int = BLOCK_TOKENS) -> Mean:
    """Mean over tokens with a standard error from means of whole blocks of `block` neighbouring tokens.

    Neighbouring tokens are alike, so an error from single tokens would be too small. Fewer than two whole blocks
    have no error: it is infinite.
    """
    blocks = values[: len(values) // block * block].reshape(-1, block).mean(-1)
    error = float(blocks.std(ddof=1) / math.sqrt(len(blocks))) if len(blocks) > 1 else math.inf
    return Mean(float(values.mean()), error, len(values))


def share(right: Sequence[bool]) -> Mean:
    """The share of right answers with its binomial standard error."""
    n = len(right)
    value = sum(right) / n
    return Mean(value, math.sqrt(value * (1 - value) / n), n)


def paired_difference(quantized: Sequence[bool], full: Sequence[bool]) -> Mean:
    """Right answers of quantized minus full precision on the same prompts; error from the differences."""
    differences = np.array(quantized, dtype=np.float64) - np.array(full, dtype=np.float64)
    error = float(differences.std(ddof=1) / math.sqrt(len(differences))) if len(differences) > 1 else math.inf
    return Mean(float(differences.mean()), error, len(differences))
