"""The KV pool: packed pages instead of full-precision buffers.  No full-precision copy of a stored page exists."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.quant import KVFormat, KVShape
from kvtuner_triton import layout
from kvtuner_triton.layout import PackedTensor


@dataclass
class LayerPages:
    """Keys and values of one layer: packed pages and, for per-channel keys, each request slot's page in progress.

    tail_key, tail_value: (slots, page_size, kv_heads, head_dim) in the model's dtype, or None.
    """

    fmt: KVFormat
    key: PackedTensor
    value: PackedTensor
    tail_key: torch.Tensor | None = None
    tail_value: torch.Tensor | None = None

    @property
    def tails(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages in progress of keys and values; raises ConfigError if this layer has none."""
        if self.tail_key is None or self.tail_value is None:
            raise ConfigError("per-channel keys have no pages in progress: reinstall kvtuner-sglang.")
        return self.tail_key, self.tail_value


class PackedKVPool(MHATokenToKVPool):
    """SGLang's MHA pool with packed pages.

    Only the attention backend of this plugin reads and writes it: it knows request slots and positions, which
    per-channel keys need.  SGLang's generic accessors raise, so nothing reads or writes around the format.
    """

    def __init__(self, size: int, *args: Any, plan: Sequence[KVFormat], fragments: bool, **kwargs: Any) -> None:
        """fragments: in the order that GPU kernels read (layout.py), which plain torch is slower to undo."""
        self.plan, self.fragments = tuple(plan), fragments
        self.layers: list[LayerPages] = []
        super().__init__(size, *args, **kwargs)

    def _create_buffers(self) -> None:
        if self.post_capture_active:
            raise ConfigError("packed KV pages cannot be backed after graph capture: unset "
                              "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING.")
        if self.v_head_dim != self.head_dim:
            raise ConfigError(f"this model's values have {self.v_head_dim} channels and its keys {self.head_dim}: "
                              "kvtuner needs equal ones, so give --enable-kvtuner-quant=False.")
        if len(self.plan) != self.layer_num:
            raise ConfigError(f"the plan has {len(self.plan)} layers but this rank holds {self.layer_num}.")
        self.shape = KVShape(self.head_num, self.head_dim, self.dtype.itemsize, self.page_size)
        pages = self.size // self.page_size + 1  # page 0 is padding
        plain: tuple[layout.Order, layout.Order] = ("plain", "plain")
        for fmt in self.plan:
            orders = layout.orders(fmt, self.shape) if self.fragments else plain
            key, value = (layout.allocate(f, self.shape, pages, self.dtype, self.device, order)
                          for f, order in zip((fmt.key, fmt.value), orders, strict=True))
            self.layers.append(LayerPages(fmt, key, value))
        self.k_scale_buffer = self.v_scale_buffer = self.dq_k_buffer = self.dq_v_buffer = None

    def create_tails(self, slots: int) -> None:
        """Allocate the pages in progress of `slots` request slots, for the layers with per-channel keys."""
        for layer in self.layers:
            if layer.fmt.key.per_channel:
                tail = (slots, self.page_size, self.head_num, self.head_dim)
                layer.tail_key = torch.zeros(tail, dtype=self.dtype, device=self.device)
                layer.tail_value = torch.zeros(tail, dtype=self.dtype, device=self.device)

    def layer(self, layer_id: int) -> LayerPages:
        """Pages of a layer by its number in the whole model."""
        return self.layers[layer_id - self.start_layer]

    @property
    def pool_bytes(self) -> int:
        return sum(self.get_kv_size_bytes())

    @property
    def tail_bytes(self) -> int:
        tails = (t for layer in self.layers for t in (layer.tail_key, layer.tail_value))
        return sum(t.nbytes for t in tails if t is not None)

    def get_kv_size_bytes(self) -> tuple[int, int]:
        return sum(p.key.nbytes for p in self.layers), sum(p.value.nbytes for p in self.layers)

    def _clear_buffers(self) -> None:
        self.layers.clear()

    def _refuse(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise ConfigError("something asked for full-precision KV buffers, which packed pages do not have: "
                          "turn off the SGLang feature that did, or give --enable-kvtuner-quant=False.")

    set_kv_buffer = get_key_buffer = get_value_buffer = get_kv_buffer = _refuse
    _get_key_buffer = _get_value_buffer = get_raw_kv_buffer = set_kv_buffer_prefix_valid = _refuse
    move_kv_cache = get_cpu_copy = load_cpu_copy = get_contiguous_buf_infos = _refuse
