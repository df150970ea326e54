"""What the kernels task measures."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

ShapeName = Literal["qwen2_5_7b", "llama3_1_8b", "qwen2_5_0_5b"]
FormatName = Literal["kv8", "kv4", "kv2", "k8v4", "k4v2", "kv4_unboosted", "kv4_token", "kv8_token", "k8v4_token",
                     "kv2_token", "k4v2_token"]
PositiveInt = Annotated[int, Field(gt=0)]
Context = Annotated[int, Field(ge=128, le=2**20)]
Some = Field(min_length=1)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class KernelsConfig:
    """Cells are every shape at every batch and context, in every format; and long_contexts, at batch 1.

    repeats: samples of every time.  memory_gib: what the caches of one cell may take, all kernels together.
    peers: time FlashInfer and SGLang's Triton kernel, too.  store: time the stores, too.
    """

    name: str
    shapes: Annotated[tuple[ShapeName, ...], Some]
    batches: Annotated[tuple[PositiveInt, ...], Some]
    contexts: Annotated[tuple[Context, ...], Some]
    formats: Annotated[tuple[FormatName, ...], Some]
    long_contexts: tuple[Context, ...]
    long_formats: tuple[FormatName, ...]
    repeats: Annotated[int, Field(ge=3)]
    memory_gib: Annotated[float, Field(gt=0)]
    peers: bool
    store: bool
