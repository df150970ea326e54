"""Times of GPU work by CUDA graph, several kinds in turn, and the ceilings they are held to."""

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product

import torch
import triton
import triton.language as tl

READS = tuple(product((1024, 4096, 16384), (1024, 4096), (4, 8)))  # programs, words at once, warps


def graph_times(works: Mapping[str, Callable[[], None]], repeats: int = 15) -> dict[str, float]:
    """Median microseconds of one replay of each work's CUDA graph; see graph_samples."""
    return {name: statistics.median(times) for name, times in graph_samples(works, repeats).items()}


def graph_samples(works: Mapping[str, Callable[[], None]], repeats: int = 15) -> dict[str, list[float]]:
    """Microseconds of `repeats` replays of each work's CUDA graph, replayed in turn so that clocks are alike for all.

    Starting a replay costs microseconds of its own: a work should be long against that.
    """
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    times: dict[str, list[float]] = {name: [] for name in works}
    for name, work in works.items():
        work()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            work()
    for i in range(repeats + 3):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if i >= 3:
                times[name].append(start.elapsed_time(end) * 1e3)
    return times


@triton.jit
def read_kernel(x, out, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up a stretch of WORDS int32, so that it is read and nothing else."""
    at = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, WORDS, BLOCK):
        total += tl.load(x + at + start)
    tl.store(out + tl.program_id(0), tl.sum(total))


def read_works(source: torch.Tensor, sums: torch.Tensor) -> dict[str, Callable[[], None]]:
    """Several ways of reading all of `source`, (words,) int32; each program adds up its part into `sums`, int32."""
    return {f"read {programs} {block} {warps}": partial(_read, source, sums, programs, block, warps)
            for programs, block, warps in READS}


def _read(source: torch.Tensor, sums: torch.Tensor, programs: int, block: int, warps: int) -> None:
    read_kernel[(programs,)](source, sums, WORDS=len(source) // programs, BLOCK=block, num_warps=warps)


def ceilings(size: int = 2**30) -> tuple[float, float]:
    """GB/s of a device copy, read and write counted, and of the fastest way of plain reading, of `size` bytes."""
    source = torch.randint(-2**31, 2**31 - 1, (size // 4,), dtype=torch.int32, device="cuda")
    target, sums = torch.empty_like(source), torch.empty(max(READS)[0], dtype=torch.int32, device="cuda")
    works: dict[str, Callable[[], None]] = {"copy": partial(target.copy_, source)}
    times = graph_times(works | read_works(source, sums))
    return 2 * size / times.pop("copy") / 1e3, size / min(times.values()) / 1e3
