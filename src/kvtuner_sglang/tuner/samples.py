"""What a run of task=tune keeps, line by line: every layer's sensitivity, every scored plan, every comparison."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerSample:
    """One layer: KL and attention error of every pair, the pairs that survive, the layers it chooses with."""

    kind: str
    layer: int
    pairs: tuple[str, ...]
    effective_bits: tuple[float, ...]
    kl: tuple[float, ...]
    attention_error: tuple[float, ...]
    surviving: tuple[str, ...]
    cluster: tuple[int, ...]


@dataclass(frozen=True)
class CandidateSample:
    """One plan that was scored on calibration text and could be chosen; kl_summed: what the additive model expects."""

    kind: str
    origin: str
    effective_bits: float
    kl: float
    kl_summed: float
    plan: tuple[str, ...]


@dataclass(frozen=True)
class SearchSample:
    """How the search ended: `candidates` plans of those `asked` for, the other trials infeasible or repeated.

    scores: how many the whole tuning needed; reused: of those, how many an earlier process had left in the cache.
    """

    kind: str
    asked: int
    candidates: int
    trials: int
    infeasible: int
    repeated: int
    scores: int
    reused: int


@dataclass(frozen=True)
class ComparedSample:
    """One plan on held-out text.

    role: tuned, front, additive, or a kind of baseline; compared: which row of the summary it is, "" if none.
    right: of every recall prompt whether it was answered right; empty where recall was not measured.
    """

    kind: str
    role: str
    compared: str
    name: str
    page_size: int
    effective_bits: float
    kl: float
    kl_se: float
    top1_agreement: float
    n_tokens: int
    right: tuple[bool, ...]
    plan: tuple[str, ...]


@dataclass(frozen=True)
class FullPrecisionSample:
    """Recall of full precision, prompt by prompt."""

    kind: str
    right: tuple[bool, ...]
