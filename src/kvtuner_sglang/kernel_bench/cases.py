"""Which shapes, formats and cells there are, and how many bytes one decode step of one layer moves.  No GPU needed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvtuner_sglang.kernel_bench.config import KernelsConfig
from kvtuner_sglang.quant import KVFormat, KVShape, TensorFormat, kv_format, page_tokens

BLOCK = 64  # tokens of a peer's page, and of a page of keys per channel
ITEMSIZE = 2  # bytes of bf16: queries, outputs, tails
KVTUNER, FLASHINFER, SGLANG_TRITON = "kvtuner", "flashinfer", "sglang_triton"
LEAST_STEPS = 20  # steps in a graph: starting a replay costs microseconds of its own
MOST_LAYERS = 1024


@dataclass(frozen=True)
class Shape:
    """Heads of one attention layer on one rank."""

    name: str
    q_heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.q_heads}/{self.kv_heads}/{self.head_dim}"


SHAPES = {shape.name: shape for shape in (Shape("qwen2_5_7b", 28, 4, 128), Shape("llama3_1_8b", 32, 8, 128),
                                          Shape("qwen2_5_0_5b", 14, 2, 64))}


def _format(key: int, value: int, *, token: bool = False, boost: bool | None = None) -> KVFormat:
    return kv_format(bits_key=key, bits_value=value, axis_key=0 if token else 1, axis_value=0, group_size=None,
                     asym=True, key_boost=boost)


FORMATS = {  # conf/quant has the same
    "kv8": _format(8, 8), "kv4": _format(4, 4), "kv2": _format(2, 2), "k8v4": _format(8, 4), "k4v2": _format(4, 2),
    "kv4_unboosted": _format(4, 4, boost=False), "kv8_token": _format(8, 8, token=True),
    "kv4_token": _format(4, 4, token=True), "kv2_token": _format(2, 2, token=True),
    "k8v4_token": _format(8, 4, token=True), "k4v2_token": _format(4, 2, token=True),
}


@dataclass(frozen=True)
class Storage:
    """How one contender's cache holds keys and values; `itemsize` counts where the format is not quantized."""

    name: str
    fmt: KVFormat
    itemsize: int = ITEMSIZE

    @property
    def page(self) -> int:
        """Of keys per channel the format's own, of keys per token 1, of peers BLOCK."""
        return page_tokens([self.fmt], None) if self.fmt.quantized else BLOCK

    @property
    def key_axis(self) -> str:
        if not self.fmt.quantized:
            return "none"
        return "channel" if self.fmt.key.per_channel else "token"

    def decode_bytes(self, shape: Shape, seq_lens: Sequence[int]) -> int:
        """What one decode step of one layer must move: stored codes and metadata, pages in progress, q and out."""
        stored = sum(seq_lens)
        if self.fmt.key.per_channel:
            stored = sum((n - 1) // self.page * self.page for n in seq_lens)
        layout = KVShape(shape.kv_heads, shape.head_dim, self.itemsize, self.page)
        tails = (sum(seq_lens) - stored) * shape.kv_heads * shape.head_dim * 2 * ITEMSIZE
        queries = 2 * len(seq_lens) * shape.q_heads * shape.head_dim * ITEMSIZE
        return round(stored * layout.bytes_per_token([self.fmt])) + tails + queries

    def layers(self, shape: Shape, seq_lens: Sequence[int], rotated_bytes: float) -> int:
        """Caches used in turn, so that together they are more than `rotated_bytes`, and no L2 serves.

        Two or more, unless a single one is four times that.
        """
        size = self.decode_bytes(shape, seq_lens)
        return max(2 if size < 4 * rotated_bytes else 1, min(MOST_LAYERS, int(-(-rotated_bytes // size))))


PLAIN = KVFormat(TensorFormat(16), TensorFormat(16))
BF16, FP8 = Storage("bf16", PLAIN), Storage("fp8", PLAIN, itemsize=1)
PEERS = ((FLASHINFER, BF16), (FLASHINFER, FP8), (SGLANG_TRITON, BF16))


def storage(name: str) -> Storage:
    """A format of ours by its name in conf/quant."""
    return Storage(name, FORMATS[name])


@dataclass(frozen=True)
class Cell:
    """One comparison: every format of ours, and the peers, at one shape, batch and context."""

    shape: Shape
    batch: int
    context: int
    formats: tuple[str, ...]
    peers: bool

    def __str__(self) -> str:
        return f"{self.shape} {self.batch} x {self.context}"

    @property
    def seq_lens(self) -> list[int]:
        return [self.context] * self.batch

    def memory(self, rotated_bytes: float) -> int:
        """Bytes of all caches of this cell; the peers in bf16 share theirs."""
        storages = [*map(storage, self.formats), *((BF16, FP8) if self.peers else ())]
        return sum(s.layers(self.shape, self.seq_lens, rotated_bytes) * s.decode_bytes(self.shape, self.seq_lens)
                   for s in storages)


def cells(config: KernelsConfig) -> Iterator[Cell]:
    """Every cell that is asked for, small ones first."""
    for name in config.shapes:
        for context in config.contexts:
            for batch in config.batches:
                yield Cell(SHAPES[name], batch, context, config.formats, config.peers)
        for context in config.long_contexts:
            yield Cell(SHAPES[name], 1, context, config.long_formats, config.peers)


def too_large(cell: Cell, memory_gib: float, rotated_bytes: float) -> str | None:
    """Why a cell is left out, or None."""
    gib = cell.memory(rotated_bytes) / 2**30
    if gib <= memory_gib:
        return None
    return f"{cell}: its caches take {gib:.3g} GiB, more than {memory_gib:g} (kernels.memory_gib)"
