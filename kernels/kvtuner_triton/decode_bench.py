"""Check and time the kernels on one GPU: python -m kvtuner_triton.decode_bench (PYTHONPATH=src:kernels).

1. Correctness of every format on ragged batches against float64, beside what bf16 PyTorch loses; poisoned outputs.
   Stores byte for byte against the CPU reference (store_bench.py).
2. Times by CUDA graph: a graph holds STEPS or more decode steps of one layer over different pages (more than the L2
   cache together), tunings are replayed in turn, the figure is the median replay divided by steps.  us: decode and
   merge, as a layer costs; plan apart, since it runs once a step for all layers.
3. The same with all pages in the L2 cache (what computing alone takes), the plain Triton kernels, and stores.

Formats are what `quant.kv_format` makes of their bits, so kv4 has boosted keys and symmetric values; "plain" has not.

Needs torch and triton only.
"""

import argparse
import ctypes
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import torch
import triton

from kvtuner_sglang.quant import KVFormat, KVShape, TensorFormat
from kvtuner_triton import layout
from kvtuner_triton.decode import DecodeWorkspace, PackedPages, Tuning, attend_rows, decode_attention, default_tuning
from kvtuner_triton.decode_case import DecodeCase, TokenCase, attend, random_case, random_token_case, relative_error
from kvtuner_triton.decode_hopper import decode_kernel
from kvtuner_triton.decode_merge import merge
from kvtuner_triton.decode_token import BLOCK, attend_tokens, decode_token_attention, token_tuning
from kvtuner_triton.store_bench import FORMATS, check_stores, time_stores
from kvtuner_triton.timing import ceilings, graph_times

ROTATED_BYTES = 160e6
STEPS = 20
PAGE, HEADS, KV_HEADS, D = 64, 28, 4, 128
SYMMETRIC = KVFormat(replace(FORMATS["k8v4"].key, symmetric=True), TensorFormat(2, symmetric=True))
SHAPES = ((16, 32768), (64, 4096), (4, 32768), (1, 32768), (1, 4096))


@dataclass(frozen=True)
class Variant:
    """One compiled kernel: format, shape and the part of the tuning that is compiled in."""

    fmt: KVFormat
    tuning: Tuning
    heads: tuple[int, int] = (HEADS, KV_HEADS)
    head_dim: int = D
    page: int = PAGE


def tuned(fmt: KVFormat) -> Tuning:
    return default_tuning(fmt.key.bits, fmt.value.bits)


def warm(v: Variant):
    """Compile, or take from the cache; nothing runs."""
    words, key, value = torch.int32, v.fmt.key, v.fmt.value
    return decode_kernel.warmup(
        torch.bfloat16, words, words, words if key.boosted else None, words, words, torch.bfloat16, torch.bfloat16,
        words, words, torch.float32, torch.float32, 0.5, 3, 4096, KV_HEADS=v.heads[1], GROUP=v.heads[0] // v.heads[1],
        D=v.head_dim, PAGE=v.page, KEY_BITS=key.bits, KEY_META=key.metadata_values, VALUE_BITS=value.bits,
        VALUE_META=value.metadata_values, BOOSTED=key.boosted, T=v.tuning.step_tokens, STAGES=v.tuning.stages,
        OVERLAP=v.tuning.overlap, grid=(1,), num_warps=1, maxnreg=v.tuning.registers)


def compile_variant(v: Variant) -> float:
    """Compile into the cache, in a process of its own; returns seconds."""
    start = time.perf_counter()
    warm(v)
    return time.perf_counter() - start


def check(v: Variant, seq_lens: list[int], portable: bool = False,
          dtype: torch.dtype = torch.bfloat16) -> tuple[float, float]:
    """(error of the kernel, of PyTorch in the same dtype), relative to float64, over all of the output; runs twice."""
    q_heads, kv_heads = v.heads
    key, value = v.fmt.key, v.fmt.value
    case = random_case(seq_lens, q_heads=q_heads, kv_heads=kv_heads, head_dim=v.head_dim, page=v.page,
                       key_bits=key.bits, value_bits=value.bits, symmetric=(key.symmetric, value.symmetric),
                       boosted=key.boosted, dtype=dtype, device="cuda")
    work = DecodeWorkspace(len(seq_lens), q_heads, kv_heads, v.head_dim, v.page, "cuda", v.tuning, portable=portable)
    return errors(work, case, lambda out: decode_attention(
        work, case.q, case.keys, case.values, case.tail_key, case.tail_value, case.req_to_token, case.sm_scale, out))


def check_tokens(bits: int, groups: int | None, page: int) -> tuple[float, float]:
    """The same of the per-token kernel."""
    formats = (TensorFormat(bits, groups), TensorFormat(bits, symmetric=True))
    case = random_token_case([1, 64, 65, 700, 129], q_heads=HEADS, kv_heads=KV_HEADS, head_dim=D, page=page,
                             formats=formats, device="cuda")
    work = DecodeWorkspace(5, HEADS, KV_HEADS, D, BLOCK, "cuda", token_tuning())
    return errors(work, case, lambda out: decode_token_attention(
        work, case.q, case.keys, case.values, case.req_to_token, case.sm_scale, out))


def errors(work: DecodeWorkspace, case: DecodeCase | TokenCase,
           run: Callable[[torch.Tensor], None]) -> tuple[float, float]:
    truth, found, out = attend(case, torch.float64), [], torch.empty_like(case.q)
    for _ in range(2):
        for buffer in (out, work.partial, work.lse):
            buffer.fill_(float("nan"))
        work.plan(case.seq_lens, case.slots)
        run(out)
        found.append(relative_error(out, truth))
    if found[0] != found[1]:
        say(f"  two runs differ: {found}")
    return found[0], relative_error(attend(case, case.q.dtype), truth)


@dataclass
class Bench:
    """Inputs of one (format, batch, context): `sets` page tables over one pool of random pages."""

    name: str
    batch: int
    context: int
    in_cache: bool = False
    per_token: bool = False

    def __post_init__(self) -> None:
        stored = self.context // PAGE if self.per_token else (self.context - 1) // PAGE
        fmt = FORMATS[self.name] if not self.per_token else KVFormat(TensorFormat(4), TensorFormat(4))
        shape = KVShape(KV_HEADS, D, 2, PAGE)
        page_bytes = PAGE * shape.bytes_per_token((fmt,))
        tail = (self.context - stored * PAGE) * KV_HEADS * D * 2 * 2
        self.bytes = self.batch * (stored * page_bytes + tail)
        pages = self.batch * stored
        self.sets = 1 if self.in_cache else max(2, min(64, int(-(-ROTATED_BYTES // self.bytes))))
        self.steps = max(STEPS, self.sets)
        pool = min(pages, int(12e6 // page_bytes)) if self.in_cache else pages * self.sets
        page = 1 if self.per_token else PAGE
        self.keys, self.values = (self.random_pages(t, pool * PAGE // page, page) for t in (fmt.key, fmt.value))
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
    def random_pages(fmt: TensorFormat, count: int, page: int) -> PackedPages:
        packed = layout.allocate(fmt, KVShape(KV_HEADS, D, 2, page), count, torch.bfloat16, "cuda")
        for x in (packed.codes, packed.extra):
            if x is not None:
                x.random_(256)
        return PackedPages(fmt.bits, packed.codes, packed.meta.uniform_(-0.05, 0.15), packed.extra)

    def works(self, tuning: Tuning, portable: bool) -> dict[str, Callable[[], None]]:
        """All steps: decode and merge, and each alone; and as many plans."""
        unit = BLOCK if self.per_token else PAGE
        work = DecodeWorkspace(self.batch, HEADS, KV_HEADS, D, unit, "cuda", tuning, portable=portable)
        scale = D**-0.5

        def plan() -> None:
            work.plan(self.seq_lens, self.slots)

        def decode(table: torch.Tensor) -> None:
            if self.per_token:
                attend_tokens(work, self.q, self.keys, self.values, table, scale)
            else:
                attend_rows(work, self.q, self.keys, self.values, self.tail_key, self.tail_value, table, scale)

        def combine(overlap: bool) -> None:
            merge(work.partial, work.lse, work.spans, self.out, overlap)

        def steps(part: str) -> None:
            for i in range(self.steps):
                if part != "merge":
                    decode(self.tables[i % self.sets])
                if part != "decode":
                    combine(tuning.overlap and part == "us")

        plan()
        self.out.fill_(float("nan"))
        steps("us")
        if self.out.isnan().any():
            say("  NaN in the output")
        return {part: lambda part=part: steps(part) for part in ("us", "decode", "merge")} | {
            "plan": lambda: [plan() for _ in range(self.steps)]}

    def time(self, tunings: list[Tuning], portable: bool = False) -> Iterator[str]:
        """Rows of the table, one a tuning."""
        works = {(i, part): work for i, tuning in enumerate(tunings)
                 for part, work in self.works(tuning, portable).items()}
        times = {key: us / self.steps for key, us in graph_times(works).items()}
        kinds = {"portable": portable, "token": self.per_token, "L2": self.in_cache}
        kind = " ".join(k for k, on in kinds.items() if on)
        for i, tuning in enumerate(tunings):
            us = times[i, "us"]
            yield (f"{self.name:9} {self.batch:3}x{self.context:<6}{kind:8} {describe(tuning):17} | {us:7.1f} us "
                   f"{self.bytes / us / 1e3:6.0f} GB/s | decode "
                   f"{times[i, 'decode']:7.1f} merge {times[i, 'merge']:5.1f} plan {times[i, 'plan']:4.1f}")


def empty_us(programs_per_sm: int) -> float:
    """us of a launch whose rows are all unused."""
    bench = Bench("kv4", 1, 1024)
    work = DecodeWorkspace(1, HEADS, KV_HEADS, D, PAGE, "cuda", Tuning(programs_per_sm=programs_per_sm))
    table = bench.tables[0]

    def steps() -> None:
        for _ in range(STEPS):
            attend_rows(work, bench.q, bench.keys, bench.values, bench.tail_key, bench.tail_value, table, 1.0)

    return graph_times({"": steps})[""] / STEPS


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - this script's own output


def describe(t: Tuning) -> str:
    extras = (f" L{t.least_pages}" if t.least_pages > 1 else "", f" R{t.registers}" if t.registers else "",
              " overlap" if t.overlap else "")
    return f"T{t.step_tokens} S{t.stages} P{t.programs_per_sm}" + "".join(extras)


CHECKS = (  # (q heads, kv heads), head_dim, page, seq_lens
    ((28, 4), 128, 64, (1, 64, 65, 700, 129, 2048, 333)),
    ((32, 8), 128, 64, (100, 1, 640)),
    ((14, 2), 64, 64, (1, 64, 65, 700, 129)),
    ((7, 1), 128, 128, (1, 128, 129, 900)),
)
TUNINGS = {  # tried beside the default
    ("kv4", 16, 32768): (Tuning(programs_per_sm=8), Tuning(programs_per_sm=10), Tuning(overlap=True),
                          Tuning(stages=3, programs_per_sm=8), Tuning(32, 3), Tuning(32, 2, 16, registers=128)),
    ("kv4", 64, 4096): (Tuning(programs_per_sm=8), Tuning(overlap=True)),
    ("kv4", 4, 32768): (Tuning(programs_per_sm=8), Tuning(overlap=True)),
    ("kv4", 1, 32768): (Tuning(programs_per_sm=8), Tuning(programs_per_sm=4), Tuning(least_pages=2),
                         Tuning(least_pages=4), Tuning(overlap=True)),
    ("kv4", 1, 4096): (Tuning(programs_per_sm=4), Tuning(overlap=True)),
    ("kv8", 16, 32768): (Tuning(programs_per_sm=4), Tuning(32, 3, 8), Tuning(32, 2, 12)),
    ("kv2", 16, 32768): (Tuning(), Tuning(programs_per_sm=16, registers=128), Tuning(stages=4, programs_per_sm=11)),
    ("k8v4", 16, 32768): (Tuning(programs_per_sm=8), Tuning(32, 2, 12)),
    ("k4v2", 16, 32768): (Tuning(stages=3, programs_per_sm=10), Tuning(programs_per_sm=15, registers=128)),
}
CHECKED = (Tuning(overlap=True), Tuning(programs_per_sm=16, registers=128))


def all_variants() -> list[Variant]:
    """Every fragment kernel this script runs, once."""
    found = [Variant(fmt, tuned(fmt), *shape[:3]) for shape in CHECKS for fmt in FORMATS.values()]
    found += [Variant(FORMATS["kv4"], t) for t in CHECKED] + [Variant(SYMMETRIC, tuned(SYMMETRIC))]
    found += [Variant(FORMATS[name], t) for (name, _, _), tunings in TUNINGS.items() for t in tunings]
    compiled = {replace(v, tuning=replace(v.tuning, programs_per_sm=0, least_pages=0)): v for v in found}
    return list(compiled.values())


def compile_all() -> None:
    """Fill Triton's cache from several processes, then print registers, spills and shared memory."""
    start = time.perf_counter()
    with ProcessPoolExecutor(12, mp_context=multiprocessing.get_context("spawn")) as pool:
        variants = all_variants()
        seconds = list(pool.map(compile_variant, variants))
    say(f"{len(variants)} kernels compiled in {time.perf_counter() - start:.0f} s, the slowest {max(seconds):.1f} s")
    for v in variants:
        for name, fmt in FORMATS.items():
            if v.heads == (HEADS, KV_HEADS) and v.fmt == fmt:
                say(f"  {name:9} {describe(v.tuning)}: {resources(v)}")


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
    """Print and judge every check."""
    found = []
    for heads, head_dim, page, seq_lens in CHECKS:
        shape = f"{heads[0]}/{heads[1]}/{head_dim} page {page}"
        for name, fmt in FORMATS.items():
            variant = Variant(fmt, tuned(fmt), heads, head_dim, page)
            found.append((f"{name:9} {shape}", *check(variant, list(seq_lens))))
    few, kv4 = [1, 64, 65, 700, 129], FORMATS["kv4"]
    found += [(f"kv4 {describe(t)}", *check(Variant(kv4, t), few)) for t in CHECKED]
    found.append(("k8v2 symmetric", *check(Variant(SYMMETRIC, tuned(SYMMETRIC)), few)))
    for name in ("kv4", "kv4 plain"):
        found.append((f"{name} portable", *check(Variant(FORMATS[name], Tuning()), few, portable=True)))
    for bits, groups, page in ((4, None, 1), (8, None, 64), (2, 32, 16)):
        found.append((f"kv{bits}_token, groups {groups}, page {page}", *check_tokens(bits, groups, page)))
    good = check_fp32()
    for what, error, bf16 in found:
        good &= error <= 2 * bf16
        say(f"  {'ok  ' if error <= 2 * bf16 else 'FAIL'} {what}: error {error:.2e}, bf16 PyTorch {bf16:.2e}")
    for what, same in check_stores():
        good &= same
        say(f"  {'ok  ' if same else 'FAIL'} {what}")
    return good


def check_fp32() -> bool:
    """The portable kernel serves fp32 models; its error beside that of fp32 PyTorch."""
    error, fp32 = check(Variant(FORMATS["kv4"], Tuning()), [1, 64, 65, 700, 129], dtype=torch.float32)
    say(f"  {'ok  ' if error <= 4 * fp32 else 'FAIL'} kv4 fp32 model: error {error:.2e}, fp32 PyTorch {fp32:.2e}")
    return error <= 4 * fp32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checks-only", action="store_true")
    parser.add_argument("--no-tunings", action="store_true", help="time the default tuning alone")
    options = parser.parse_args()
    start = time.perf_counter()
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    compile_all()
    good = check_all()
    if options.checks_only:
        return 0 if good else 1
    say(f"checked after {time.perf_counter() - start:.0f} s")
    copy, read = ceilings()
    say(f"device copy {copy:.0f} GB/s (read + write), plain read {read:.0f} GB/s")
    say(f"a launch of unused rows: {empty_us(4):.1f} us at P4, {empty_us(12):.1f} us at P12")
    for name, fmt in FORMATS.items():
        for batch, context in SHAPES:
            tunings = [tuned(fmt)]
            if not options.no_tunings:
                tunings += TUNINGS.get((name, batch, context), ())
            for line in Bench(name, batch, context).time(tunings):
                say(line)
        for line in Bench(name, *SHAPES[0], in_cache=True).time([tuned(fmt)]):
            say(line)
    for batch, context in (SHAPES[0], (1, 32768)):
        tunings = [token_tuning(), Tuning(programs_per_sm=3), Tuning(programs_per_sm=8)]
        for line in Bench("kv4", batch, context, per_token=True).time(tunings):
            say(line)
    for line in Bench("kv4", *SHAPES[0]).time([Tuning(programs_per_sm=4)], portable=True):
        say(line)
    for line in time_stores(copy):
        say(line)
    say(f"{'all checks passed' if good else 'A CHECK FAILED'}, {time.perf_counter() - start:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
