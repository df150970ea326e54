"""What the machine of a run can do at best, measured: FLOP/s of a matrix product, bytes/s of reading memory.

    python -m kvtuner_sglang.measure.roofline cpu float32 425000000      # the child process: JSON on stdout

On a CPU one thread is measured, and a server with N of them gets N times as much.  Threads share clocks, caches and
memory, so that is more than they reach together: a floor made of it is never too high.  Work is cut into pieces of
milliseconds and the fastest piece counts, so that other programs on the machine do not raise the floor either.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from kvtuner_sglang.errors import RunFailed
from kvtuner_sglang.serving.cache_folder import cache_folder

VERSION = 1  # raised when what is measured changes
SECONDS = 0.5  # of each of the three measurements
CPU_MATRIX, GPU_MATRIX = 512, 8192
CPU_PIECE_BYTES = 8 << 20
MAX_BUFFER_BYTES = 1 << 30
TIMEOUT_S = 180.0  # importing torch from a cold disk takes most of it

Say = Callable[[str], None]


@dataclass(frozen=True)
class Roofline:
    """The best of one CPU thread or one GPU; `buffer_bytes` were read over and over, so caches help as with weights."""

    device: str
    dtype: str
    buffer_bytes: int
    flops_per_s: float
    bytes_per_s: float


def roofline(device: str, dtype: str, weight_bytes: int, machine: str, say: Say) -> Roofline:
    """The roofline of `machine` (evidence's name of the hardware), measured once and then kept in the cache.

    device: "cpu" or "cuda"; dtype: of the served weights; weight_bytes: what one rank reads a step.  Raises RunFailed.
    """
    buffer_bytes = min(weight_bytes, MAX_BUFFER_BYTES)
    key = json.dumps([VERSION, machine, device, dtype, buffer_bytes])
    kept = cache_folder("roofline") / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if kept.is_file():
        return Roofline(**json.loads(kept.read_text())["roofline"])
    say("measuring what this machine can do at best, once, a few seconds")
    found = _in_a_child(device, dtype, buffer_bytes)
    fresh = kept.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps({"machine": machine, "roofline": asdict(found)}, indent=1) + "\n")
    fresh.rename(kept)  # a reader never sees half a file
    return found


def _in_a_child(device: str, dtype: str, buffer_bytes: int) -> Roofline:
    """In a process of its own: its threads and its GPU memory are gone before a server starts."""
    command = [sys.executable, "-m", __name__, device, dtype, str(buffer_bytes)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    except subprocess.TimeoutExpired as error:
        raise RunFailed(f"the machine's roofline was not measured within {TIMEOUT_S:g} s: free the machine.") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RunFailed(f"the machine's roofline could not be measured ({last}): run `{' '.join(command[1:])}` with "
                        "this Python to see why.") from error
    return Roofline(**json.loads(done.stdout))


def measure(device: str, dtype: str, buffer_bytes: int, seconds: float = SECONDS) -> Roofline:
    """Measure in this process; float32 counts beside `dtype`, in which a CPU may have no fast arithmetic."""
    import torch

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # a GPU may use TF32
    finish: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None
    size = GPU_MATRIX if device == "cuda" else CPU_MATRIX
    flops = 2.0 * size**3
    best_s = []
    for kind in sorted({"float32", dtype}):
        a = torch.ones(size, size, dtype=getattr(torch, kind), device=device)
        best_s.append(_fastest_s([lambda a=a: a @ a], finish, seconds))  # type: ignore[misc]
    # Written once: pages that never were share one page of zeros, which the cache holds.
    buffer = torch.ones(buffer_bytes // 4, dtype=torch.float32, device=device)
    piece = buffer.numel() if device == "cuda" else min(CPU_PIECE_BYTES // 4, buffer.numel())
    pieces = [part for part in buffer.split(piece) if part.numel() == piece]
    read_s = _fastest_s([part.max for part in pieces], finish, seconds)
    return Roofline(device, dtype, buffer_bytes, flops / min(best_s), piece * 4 / read_s)


def _fastest_s(works: Sequence[Callable[[], object]], finish: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest call, the works taking turns for `seconds` and at least twice each."""
    for _ in range(2):
        works[0]()
    finish()
    fastest, rounds, until = float("inf"), 0, time.perf_counter() + seconds
    while rounds < 2 or time.perf_counter() < until:
        for work in works:
            started = time.perf_counter()
            work()
            finish()
            fastest = min(fastest, time.perf_counter() - started)
        rounds += 1
    return fastest


def main(arguments: Sequence[str]) -> None:
    device, dtype, buffer_bytes = arguments
    sys.stdout.write(json.dumps(asdict(measure(device, dtype, int(buffer_bytes)))))


if __name__ == "__main__":
    main(sys.argv[1:])
