"""A small world around the real pool and the real backend: request slots, a page table, batches."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from kvtuner_sglang.plugin.options import KvtunerOptions
from kvtuner_sglang.plugin.pool import PackedKVPool
from kvtuner_sglang.plugin.reference_backend import ReferenceBackend
from kvtuner_sglang.quant import KVFormat

KV_HEADS, Q_HEADS, HEAD_DIM = 2, 4, 64


def layer_numbered(layer_id: int) -> SimpleNamespace:
    """What SGLang hands the backend with the queries of a layer."""
    return SimpleNamespace(
        layer_id=layer_id,
        tp_q_head_num=Q_HEADS,
        qk_head_dim=HEAD_DIM,
        scaling=HEAD_DIM**-0.5,
        is_cross_attention=False,
        sliding_window_size=-1,
        logit_cap=0.0,
    )


LAYER = layer_numbered(0)


@dataclass
class World:
    """The layers of one rank; `fmt`: of the only one, or of each.

    `table[slot, position]` is the token's location, page * page_size + offset.
    """

    fmt: KVFormat | Sequence[KVFormat]
    page_size: int
    pages: int = 64
    slots: int = 6
    max_tokens: int = 512
    backend_class: type = ReferenceBackend
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    fragments: bool = False
    free_pages: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.plan = [self.fmt] if isinstance(self.fmt, KVFormat) else list(self.fmt)
        size = (self.pages - 1) * self.page_size
        self.pool = PackedKVPool(
            size,
            page_size=self.page_size,
            dtype=self.dtype,
            head_num=KV_HEADS,
            head_dim=HEAD_DIM,
            layer_num=len(self.plan),
            device=self.device,
            enable_memory_saver=False,
            plan=self.plan,
            fragments=self.fragments,
        )
        self.table = torch.zeros(self.slots, self.max_tokens, dtype=torch.int32, device=self.device)
        runner = SimpleNamespace(
            token_to_kv_pool=self.pool,
            req_to_token_pool=SimpleNamespace(req_to_token=self.table),
            server_args=SimpleNamespace(_kvtuner=KvtunerOptions()),
            device=self.device,
            model_config=SimpleNamespace(num_attention_heads=Q_HEADS),
        )
        self.backend = self.backend_class(runner)
        self.free_pages = list(range(1, self.pages))

    def place(self, slot: int, start: int, end: int) -> torch.Tensor:
        """Give positions start..end-1 of a slot their locations, taking free pages as needed."""
        for position in range(start, end):
            if position % self.page_size == 0:
                self.table[slot, position] = self.free_pages.pop() * self.page_size
            else:
                self.table[slot, position] = self.table[slot, position - 1] + 1
        return self.table[slot, start:end].long()

    def forward(
        self,
        spans: list[tuple[int, int, int]],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        decode: bool = False,
    ) -> torch.Tensor:
        """The only layer of one batch: see forward_layers."""
        (out,) = self.forward_layers(spans, q, k, v, decode=decode)
        return out

    def forward_layers(
        self,
        spans: list[tuple[int, int, int]],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        decode: bool = False,
    ) -> list[torch.Tensor]:
        """All layers of one batch, all given the same q, k, v: (tokens, heads, head_dim).

        Spans are (slot, start, end), already placed.
        """
        mode = SimpleNamespace(is_decode_or_idle=lambda: decode)
        locations = torch.cat([self.table[slot, start:end].long() for slot, start, end in spans])
        batch = SimpleNamespace(
            forward_mode=mode,
            batch_size=len(spans),
            out_cache_loc=locations,
            seq_lens=torch.tensor([end for _, _, end in spans], device=self.device),
            req_pool_indices=torch.tensor([slot for slot, _, _ in spans], device=self.device),
            extend_prefix_lens=torch.tensor([start for _, start, _ in spans]),
            extend_prefix_lens_cpu=[start for _, start, _ in spans],
            extend_seq_lens_cpu=[end - start for _, start, end in spans],
        )
        self.backend.init_forward_metadata(batch)
        forward = self.backend.forward_decode if decode else self.backend.forward_extend
        return [
            forward(q.flatten(1), k.flatten(1), v.flatten(1), layer_numbered(number), batch).view(
                -1, Q_HEADS, HEAD_DIM
            )
            for number in range(len(self.plan))
        ]


def attention_by_hand(q: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """One query (q_heads, head_dim) over keys (tokens, kv_heads, head_dim), in float64, head by head."""
    out = []
    for head in range(Q_HEADS):
        k, v = key[:, head * KV_HEADS // Q_HEADS].double(), value[:, head * KV_HEADS // Q_HEADS].double()
        weights = torch.softmax(k @ q[head].double() * HEAD_DIM**-0.5, 0)
        out.append(weights @ v)
    return torch.stack(out)
