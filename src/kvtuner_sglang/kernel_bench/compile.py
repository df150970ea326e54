"""Build every kernel before anything is timed, in several processes at once: each fills the compilers' own caches."""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from kvtuner_sglang.errors import RunFailed
from kvtuner_sglang.kernel_bench.cases import SHAPES
from kvtuner_sglang.kernel_bench.config import KernelsConfig

MOST_PROCESSES = 12
SHORT = 130  # tokens: two complete pages and a tail


@dataclass(frozen=True)
class Job:
    """Kernels of one shape: of one format, or, where it is None, the peers'."""

    shape: str
    format: str | None
    batches: tuple[int, ...]
    store: bool

    def __str__(self) -> str:
        return f"{self.format or 'peers'} {SHAPES[self.shape]}"


def jobs(config: KernelsConfig) -> list[Job]:
    """The longest first: a peer's kernels are compiled by nvcc."""
    formats = tuple(dict.fromkeys((*config.formats, *config.long_formats)))
    peers = [Job(shape, None, config.batches, False) for shape in config.shapes] if config.peers else []
    return peers + [Job(shape, name, config.batches, config.store and shape == config.shapes[0])
                    for shape in config.shapes for name in formats]


def build(job: Job, device: str = "cuda") -> Job:
    """Run the kernels on a few tokens; raises RunFailed if they cannot be built."""
    from kvtuner_sglang.kernel_bench import check, store_times

    shape, formats = SHAPES[job.shape], [job.format] if job.format else []
    for batch in (*job.batches, len(check.LENGTHS)):
        check.check_decode(shape, formats, not job.format, device, 0, [SHORT] * batch)
    if job.store:
        list(store_times.check_stores(shape, formats, device, 0))
    return job


def build_all(config: KernelsConfig) -> Iterator[Job]:
    """Build all jobs, yielding each as it is done; raises RunFailed."""
    todo: Sequence[Job] = jobs(config)
    processes = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 2, len(todo)))
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for done in as_completed([pool.submit(build, job) for job in todo]):
                yield done.result()
        except BrokenProcessPool as error:
            raise RunFailed("a process that compiled kernels was killed: see whether memory ran out.") from error
        finally:
            pool.shutdown(cancel_futures=True)
