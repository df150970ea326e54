"""Times of one cell: CUDA graphs of all kernels in turn, each over several layers' caches, more than L2 holds."""

from collections.abc import Callable, Mapping
from functools import partial

from kvtuner_sglang.errors import MeasurementInvalid
from kvtuner_sglang.kernel_bench.caches import Batch, Pages
from kvtuner_sglang.kernel_bench.cases import KVTUNER, LEAST_STEPS, Cell
from kvtuner_sglang.kernel_bench.check import contenders, naming
from kvtuner_sglang.kernel_bench.contenders import Contender
from kvtuner_sglang.kernel_bench.samples import DecodeTimes

Works = Mapping[str, Callable[[], None]]
Measure = Callable[[Works, int], dict[str, list[float]]]  # kvtuner_triton.timing.graph_samples


def time_cell(cell: Cell, repeats: int, rotated_bytes: float, measure: Measure, device: str, seed: int,
              multiprocessors: int | None = None) -> list[DecodeTimes]:
    """Every contender's times, in one process, replayed in turn."""
    pages, batch = Pages.random(cell.shape, device, seed), Batch.random(cell.shape, cell.seq_lens, device, seed)
    racing = {_name(c): c for c in contenders(pages, batch, cell.formats, cell.peers, rotated_bytes, multiprocessors)}
    works: dict[str, Callable[[], None]] = {}
    for name, contender in racing.items():
        works[name] = partial(_steps, contender)
        if contender.kernel == KVTUNER:
            works[f"plan {name}"] = partial(_plans, contender)
    with naming(KVTUNER, f"one of {', '.join(racing)}"):
        times = measure(works, repeats)
    return [_times(cell, contender, times[name], times.get(f"plan {name}", [])) for name, contender in racing.items()]


def _name(contender: Contender) -> str:
    return f"{contender.kernel} {contender.store.name} {contender.options}".strip()


def _count(contender: Contender) -> int:
    return max(LEAST_STEPS, contender.layers)


def _steps(contender: Contender) -> None:
    for i in range(_count(contender)):
        contender.layer(i % contender.layers)


def _plans(contender: Contender) -> None:
    for _ in range(LEAST_STEPS):
        contender.plan()


def _times(cell: Cell, contender: Contender, replays: list[float], plans: list[float]) -> DecodeTimes:
    if not contender.out.isfinite().all():
        raise MeasurementInvalid(f"{_name(contender)} gave numbers that are not finite at {cell}.")
    shape, store, steps = cell.shape, contender.store, _count(contender)
    return DecodeTimes(
        kernel=contender.kernel, format=store.name, options=contender.options, key_axis=store.key_axis,
        shape=shape.name, q_heads=shape.q_heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim, page=store.page,
        batch=cell.batch, context=cell.context, layers=contender.layers, steps=steps,
        bytes=store.decode_bytes(shape, cell.seq_lens), us=tuple(round(t / steps, 3) for t in replays),
        plan_us=tuple(round(t / LEAST_STEPS, 3) for t in plans),
    )
