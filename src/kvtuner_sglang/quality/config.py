"""What the quality task measures with."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

PositiveInt = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class QualityConfig:
    """How much is measured; the same for every format that is to be compared.

    dtype: the precision of both engines; float32 keeps the noise floor far below what four bits cost, "model" is the
    model's own (conf/model).  batch: prompts in flight.  kv_gib: for keys, values and the pages in progress of `batch`
    requests.  timeout_s: bound on one engine.  probe_bound: KL in nats above which a plan is not served.
    """

    name: str
    prose_tokens: PositiveInt
    window_tokens: PositiveInt
    recall_items: Count
    arithmetic_items: Count
    batch: PositiveInt
    kv_gib: Annotated[float, Field(gt=0)]
    context_length: PositiveInt
    timeout_s: Annotated[float, Field(gt=0)]
    dtype: Literal["float32", "model"]
    probe: bool
    probe_tokens: PositiveInt
    probe_bound: Annotated[float, Field(gt=0)]
