"""Check and time decode attention on one GPU: python -m kvtuner_triton.decode_bench (PYTHONPATH=src:kernels).

1. Correctness of every bit pair on ragged batches against float64, beside what bf16 PyTorch loses; poisoned outputs.
2. Times by CUDA graph: a graph holds `sets` decode steps over different pages (more than the L2 cache together), the
   figure is the median over replays divided by `sets`.  us: decode and merge, as a layer costs; plan apart, since it
   runs once a step for all layers.  floor: bytes that must be read over 3.066 TB/s, the plain read speed of an H100.
3. The same with all pages in the L2 cache (what computing alone takes), and variants of the tuning.

Needs torch and triton only.
"""

import argparse
import ctypes
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
import triton

from kvtuner_triton.decode import DecodeWorkspace, PackedPages, Tuning, attend_rows, decode_attention, default_tuning
from kvtuner_triton.decode_case import attend, random_case, relative_error
from kvtuner_triton.decode_hopper import decode_kernel
from kvtuner_triton.decode_merge import merge

READ_BYTES_PER_US = 3.066e6
ROTATED_BYTES = 160e6
PAGE, HEADS, KV_HEADS, D = 64, 28, 4, 128
PAIRS = ((4, 4), (8, 8), (2, 2), (8, 4), (4, 2))
SHAPES = ((16, 32768), (64, 4096), (4, 32768), (1, 32768), (1, 4096))


@dataclass(frozen=True)
class Variant:
    """One compiled kernel: bits, shape and the part of the tuning that is compiled in."""

    bits: tuple[int, int]
    tuning: Tuning
    heads: tuple[int, int] = (HEADS, KV_HEADS)
    head_dim: int = D
    page: int = PAGE


def warm(v: Variant):
    """Compile, or take from the cache; nothing runs."""
    words = torch.int32
    return decode_kernel.warmup(
        torch.bfloat16, words, words, words, words, torch.bfloat16, torch.bfloat16, words, words, torch.float32,
        torch.float32, 0.5, 3, 4096, KV_HEADS=v.heads[1], GROUP=v.heads[0] // v.heads[1], D=v.head_dim, PAGE=v.page,
        KEY_BITS=v.bits[0], VALUE_BITS=v.bits[1], T=v.tuning.step_tokens, STAGES=v.tuning.stages, grid=(1,),
        num_warps=1)


def compile_variant(v: Variant) -> float:
    """Compile into the cache, in a process of its own; returns seconds."""
    start = time.perf_counter()
    warm(v)
    return time.perf_counter() - start


def check(v: Variant, seq_lens: list[int]) -> tuple[float, float]:
    """(error of the kernel, error of bf16 PyTorch), relative to float64, over all of the output; runs twice."""
    q_heads, kv_heads = v.heads
    case = random_case(seq_lens, q_heads=q_heads, kv_heads=kv_heads, head_dim=v.head_dim, page=v.page,
                       key_bits=v.bits[0], value_bits=v.bits[1], device="cuda")
    truth = attend(case, torch.float64)
    work = DecodeWorkspace(len(seq_lens), q_heads, kv_heads, v.head_dim, v.page, "cuda", v.tuning)
    out = torch.empty_like(case.q)
    errors = []
    for _ in range(2):
        for buffer in (out, work.partial, work.lse):
            buffer.fill_(float("nan"))
        work.plan(case.seq_lens, case.slots)
        decode_attention(work, case.q, case.keys, case.values, case.tail_key, case.tail_value, case.req_to_token,
                         case.sm_scale, out)
        errors.append(relative_error(out, truth))
    if errors[0] != errors[1]:
        say(f"  two runs differ: {errors}")
    return errors[0], relative_error(attend(case, torch.bfloat16), truth)


@dataclass
class Bench:
    """Inputs of one (bits, batch, context): `sets` page tables over one pool of random pages."""

    bits: tuple[int, int]
    batch: int
    context: int
    in_cache: bool = False

    def __post_init__(self) -> None:
        stored = (self.context - 1) // PAGE
        self.page_bytes = [KV_HEADS * (PAGE * D * self.bits[0] // 8 + 4 * D),
                           KV_HEADS * (PAGE * D * self.bits[1] // 8 + 4 * PAGE)]
        tail = ((self.context - 1) % PAGE + 1) * KV_HEADS * D * 2 * 2
        self.bytes = self.batch * (stored * sum(self.page_bytes) + tail)
        pages = self.batch * stored
        self.sets = 1 if self.in_cache else max(2, min(64, int(-(-ROTATED_BYTES // self.bytes))))
        pool = min(pages, int(12e6 // sum(self.page_bytes))) if self.in_cache else pages * self.sets
        self.keys = PackedPages(self.bits[0], self.codes(pool, self.bits[0]), self.meta(pool, 2, D))
        self.values = PackedPages(self.bits[1], self.codes(pool, self.bits[1]), self.meta(pool, PAGE, 1, 2))
        self.tail_key, self.tail_value = (torch.randn(self.batch, PAGE, KV_HEADS, D, device="cuda").bfloat16()
                                          for _ in range(2))
        ids = torch.randperm(pages * self.sets, device="cuda").to(torch.int32) % pool
        tokens = ids.view(self.sets, self.batch, stored, 1) * PAGE + torch.arange(PAGE, device="cuda")
        self.tables = torch.nn.functional.pad(tokens.flatten(2), (0, 2 * PAGE)).to(torch.int32)
        self.q = torch.randn(self.batch, HEADS, D, device="cuda").bfloat16()
        self.seq_lens = torch.full((self.batch,), self.context, device="cuda")
        self.slots = torch.arange(self.batch, device="cuda")
        self.out = torch.empty_like(self.q)

    @staticmethod
    def codes(pool: int, bits: int) -> torch.Tensor:
        shape = (pool, KV_HEADS, PAGE, D * bits // 8)
        return torch.randint(0, 256, shape, device="cuda", dtype=torch.uint8)

    @staticmethod
    def meta(pool: int, *shape: int) -> torch.Tensor:
        return torch.rand((pool, KV_HEADS, *shape), device="cuda").mul_(0.2).sub_(0.05).half()

    @property
    def floor_us(self) -> float:
        return self.bytes / READ_BYTES_PER_US

    def time(self, tuning: Tuning) -> dict[str, float]:
        """us of decode and merge together, of each alone, and of the plan."""
        work = DecodeWorkspace(self.batch, HEADS, KV_HEADS, D, PAGE, "cuda", tuning)
        scale = D**-0.5

        def plan() -> None:
            work.plan(self.seq_lens, self.slots)

        def steps(part: str) -> None:
            for table in self.tables:
                if part != "merge":
                    attend_rows(work, self.q, self.keys, self.values, self.tail_key, self.tail_value, table, scale)
                if part != "decode":
                    merge(work.partial, work.lse, work.spans, self.out)

        plan()
        both = graph_us(lambda: steps("both")) / self.sets
        self.out.fill_(float("nan"))
        steps("both")
        if self.out.isnan().any():
            say("  NaN in the output")
        return {"us": both, "decode": graph_us(lambda: steps("decode")) / self.sets,
                "merge": graph_us(lambda: steps("merge")) / self.sets, "plan": graph_us(plan)}


def graph_us(work, repeats: int = 21) -> float:
    """Median microseconds of one replay of a CUDA graph of `work`, after a few replays to warm up."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for i in range(repeats + 5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 5:
            times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def copy_rate() -> float:
    """GB/s of a device copy of 1 GiB, read and write counted."""
    source = torch.randint(0, 256, (2**30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / graph_us(lambda: target.copy_(source)) / 1e3


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - this script's own output


def name(bits: tuple[int, int]) -> str:
    return f"kv{bits[0]}" if bits[0] == bits[1] else f"k{bits[0]}v{bits[1]}"


def row(bench: Bench, tuning: Tuning) -> str:
    t = bench.time(tuning)
    rate = bench.bytes / t["us"] / 1e3
    place = "L2 " if bench.in_cache else "   "
    return (f"{name(bench.bits):5} {bench.batch:3}x{bench.context:<6}{place} T{tuning.step_tokens} S{tuning.stages} "
            f"P{tuning.programs_per_sm:<2} L{tuning.least_pages} | {t['us']:7.1f} us {rate:6.0f} GB/s "
            f"{t['us'] / bench.floor_us:5.2f} x floor {bench.floor_us:6.1f} | decode {t['decode']:7.1f} "
            f"merge {t['merge']:5.1f} plan {t['plan']:4.1f}")


CHECKS = (  # (q heads, kv heads), head_dim, page, seq_lens
    ((28, 4), 128, 64, (1, 64, 65, 700, 129, 2048, 333)),
    ((32, 8), 128, 64, (100, 1, 640)),
    ((14, 2), 64, 64, (1, 64, 65, 700, 129)),
    ((7, 1), 128, 128, (1, 128, 129, 900)),
)
TUNINGS = {  # step_tokens, stages, programs_per_sm, least_pages
    ((4, 4), 16, 32768): ((64, 2, 8, 1), (64, 2, 12, 1), (64, 3, 4, 1), (64, 3, 6, 1), (64, 3, 16, 1), (64, 3, 32, 1),
                          (64, 4, 6, 1), (32, 3, 8, 1), (32, 4, 12, 1), (32, 6, 8, 1)),
    ((4, 4), 1, 32768): ((64, 3, 4, 1), (64, 3, 6, 1), (64, 3, 12, 1), (64, 3, 8, 4), (64, 3, 8, 8), (32, 4, 12, 1)),
    ((4, 4), 1, 4096): ((64, 3, 8, 2), (64, 3, 8, 4), (32, 4, 8, 1)),
    ((8, 8), 16, 32768): ((64, 2, 4, 1), (64, 2, 8, 1), (64, 3, 4, 1), (32, 2, 12, 1), (32, 4, 6, 1), (32, 3, 16, 1)),
    ((2, 2), 16, 32768): ((64, 2, 12, 1), (64, 2, 16, 1), (64, 3, 12, 1), (64, 4, 8, 1), (64, 6, 8, 1), (64, 3, 16, 1)),
    ((8, 4), 16, 32768): ((64, 2, 8, 1), (32, 4, 8, 1)),
}


def all_variants() -> list[Variant]:
    """Every kernel this script runs, once."""
    found = [Variant(bits, default_tuning(*bits), *shape[:3]) for shape in CHECKS for bits in PAIRS]
    found += [Variant(bits, Tuning(*t)) for (bits, _, _), tunings in TUNINGS.items() for t in tunings]
    compiled = {(v.bits, v.tuning.step_tokens, v.tuning.stages, v.heads, v.head_dim, v.page): v for v in found}
    return list(compiled.values())


def compile_all() -> None:
    """Fill Triton's cache from several processes, then print registers, spills and shared memory."""
    start = time.perf_counter()
    with ProcessPoolExecutor(12, mp_context=multiprocessing.get_context("spawn")) as pool:
        variants = all_variants()
        seconds = list(pool.map(compile_variant, variants))
    say(f"{len(variants)} kernels compiled in {time.perf_counter() - start:.0f} s, the slowest {max(seconds):.1f} s")
    for v in variants:
        if v.heads == (HEADS, KV_HEADS):
            say(f"  {name(v.bits):5} T{v.tuning.step_tokens} S{v.tuning.stages}: {resources(v)}")


def resources(v: Variant) -> str:
    """Registers, spills, shared memory, and how many programs fit a multiprocessor as the driver counts."""
    kernel = warm(v)
    shared = kernel.metadata.shared
    try:
        kernel._init_handles()  # noqa: SLF001 - registers and spills are known once it is loaded
        count = ctypes.c_int(-1)
        ctypes.CDLL("libcuda.so.1").cuOccupancyMaxActiveBlocksPerMultiprocessor(
            ctypes.byref(count), ctypes.c_void_p(kernel.function), 32, ctypes.c_size_t(shared))
    except (AttributeError, OSError, TypeError, ctypes.ArgumentError) as error:
        return f"{shared} B shared, the rest unknown: {error}"
    return (f"{kernel.n_regs} registers, {kernel.n_spills} spills, {shared} B shared, "
            f"{count.value} programs an SM")


def check_all() -> bool:
    good = True
    for heads, head_dim, page, seq_lens in CHECKS:
        for bits in PAIRS:
            error, bf16 = check(Variant(bits, default_tuning(*bits), heads, head_dim, page), list(seq_lens))
            passed = error <= 2 * bf16
            good &= passed
            say(f"  {'ok  ' if passed else 'FAIL'} {name(bits):5} {heads[0]}/{heads[1]}/{head_dim} page {page}: "
                  f"error {error:.2e}, bf16 PyTorch {bf16:.2e}")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checks-only", action="store_true")
    parser.add_argument("--no-tunings", action="store_true", help="time the default tuning alone")
    options = parser.parse_args()
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    compile_all()
    good = check_all()
    if options.checks_only:
        return 0 if good else 1
    say(f"device copy {copy_rate():.0f} GB/s (read + write)")
    for bits in PAIRS:
        for batch, context in SHAPES:
            bench = Bench(bits, batch, context)
            say(row(bench, default_tuning(*bits)))
            if not options.no_tunings:
                for tuning in TUNINGS.get((bits, batch, context), ()):
                    say(row(bench, Tuning(*tuning)))
        say(row(Bench(bits, *SHAPES[0], in_cache=True), default_tuning(*bits)))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
