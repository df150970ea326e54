"""Environment and arguments of a server process on SGLang's CPU engine.

Nothing else may import the stand-ins beside this file: they are reached only through the PYTHONPATH given here, so a
server with a GPU never sees them.
"""

import os
from pathlib import Path

STANDINS = Path(__file__).with_name("standins")


def cpu_server_environment(tp_size: int, ranks_on_host: int, node_rank: int, interface: str = "lo") -> dict[str, str]:
    """Additions to the environment of one node's launcher, whose ranks inherit them.

    tp_size: tensor-parallel ranks; ranks_on_host: all ranks, of every node, that share this host's cores;
    node_rank: which node this is; interface: the network interface that reaches the other nodes.
    """
    cores = sorted(os.sched_getaffinity(0))
    threads = max(1, len(cores) // ranks_on_host)
    first = node_rank * tp_size * threads if ranks_on_host > tp_size else 0
    return {
        # Without a GPU SGLang picks this engine only when told to.
        "SGLANG_USE_CPU_ENGINE": "1",
        # More threads than cores make every rank wait for the slowest of them.
        "OMP_NUM_THREADS": str(threads),
        # One entry per tensor-parallel rank; unset, SGLang refuses more ranks than NUMA nodes.
        "SGLANG_CPU_OMP_THREADS_BIND": _bindings(cores, first, threads, tp_size),
        # gloo would otherwise look the host's own name up, which may lead to an address that no rank listens on.
        "GLOO_SOCKET_IFNAME": interface,
        # A plugin loads after the imports that need the stand-ins, the path is there before.
        "PYTHONPATH": os.pathsep.join([str(STANDINS), *filter(None, [os.environ.get("PYTHONPATH")])]),
        # A launcher that is told to end waits 60 s for dumps of CUDA memory, which there is none of.
        "SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS": "0",
        # A checkpoint is a folder here; asking the hub about it only delays the start.
        "HF_HUB_OFFLINE": "1",
    }


def _bindings(cores: list[int], first: int, threads: int, tp_size: int) -> str:
    """`threads` cores per rank, taken in turn: "0,1|2,3"; ranks share cores when there are too few."""
    taken = [cores[(first + n) % len(cores)] for n in range(tp_size * threads)]
    return "|".join(",".join(map(str, taken[n : n + threads])) for n in range(0, len(taken), threads))


def cpu_server_arguments() -> list[str]:
    """Arguments that every CPU server needs beside --device cpu; attention backend and dtype are the caller's."""
    return [
        "--disable-overlap-schedule",  # it overlaps the scheduler with a device that works by itself
        "--grammar-backend",
        "none",  # its start-up compiles kernels for structured output, which no measurement asks for
    ]
