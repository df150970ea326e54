"""Where a run ran: commit, lock, versions, processor and GPUs.  What cannot be found out is null with a reason."""

import hashlib
import os
import platform
import re
import shutil
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from kvtuner_sglang.evidence.record import Environment

PACKAGES = ("kvtuner-sglang", "sglang", "torch", "triton", "transformers", "sglang-kernel", "flashinfer-python",
            "numpy", "wandb", "hydra-core")
PROJECT_ROOT = Path(__file__).resolve().parents[3]
COMMAND_TIMEOUT_S = 20
# What runs leave behind and what is made of it; of a plan there the record has the contents.
RESULTS = (":(exclude)runs", ":(exclude)paper")
BUSY_SAMPLE_S = 0.3
BUSY_PERCENT = 50


class Unknown(Exception):
    """Something about the machine could not be found out; the message is the reason that the record keeps."""


def collect_environment(project_root: Path = PROJECT_ROOT) -> Environment:
    """The environment of this process; asks git and nvidia-smi. Never raises for what is unknown."""
    found: dict[str, Any] = {}
    unknown: dict[str, str] = {}
    sources = {
        "git_sha": lambda: _run("git", "-C", str(project_root), "rev-parse", "HEAD"),
        "git_dirty": lambda: bool(_run("git", "-C", str(project_root), "status", "--porcelain", "--", ".", *RESULTS)),
        "lock_file": lambda: _lock(project_root).name,
        "lock_sha256": lambda: hashlib.sha256(_lock(project_root).read_bytes()).hexdigest(),
        "gpus": lambda: tuple(_nvidia("name")),
        "gpu_driver": lambda: _nvidia("driver_version")[0],
        "gpu_clocks": lambda: "; ".join(_nvidia("clocks.max.sm,clocks.max.mem,power.limit")),
        "gpu_topology": lambda: _run("nvidia-smi", "topo", "-m"),
        "cuda": _cuda_version,
    }
    for name, source in sources.items():
        try:
            found[name] = source()
        except Unknown as error:
            found[name], unknown[name] = None, str(error)
    return Environment(
        host=socket.gethostname(), os=platform.platform(), python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES}, cpu=_cpu_model(), cpu_cores=_cores(),
        ram_mib=psutil.virtual_memory().total // 2**20, load_average=os.getloadavg(),
        cpu_busy_percent=_busy_percent(), unknown=unknown, **found,
    )


def busy_warnings(environment: Environment) -> tuple[str, ...]:
    """A sentence for the record of a run whose times count, if other work had more than half of the cores."""
    percent = environment.cpu_busy_percent
    if percent <= BUSY_PERCENT:
        return ()
    return (f"Just before the start other work kept {percent:.0f}% of this machine's cores busy: times may be too "
            "long.",)


def _run(*command: str) -> str:
    if shutil.which(command[0]) is None:
        raise Unknown(f"{command[0]} is not installed here")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        raise Unknown(f"`{' '.join(command[:1] + command[-2:])}` failed: {type(error).__name__}") from error
    return done.stdout.strip()


def _nvidia(query: str) -> list[str]:
    rows = _run("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader").splitlines()
    if not rows:
        raise Unknown("nvidia-smi lists no GPU")
    return rows


def _cuda_version() -> str:
    match = re.search(r"CUDA Version:\s*([\d.]+)", _run("nvidia-smi"))
    if match is None:
        raise Unknown("nvidia-smi names no CUDA version")
    return match.group(1)


def _lock(project_root: Path) -> Path:
    """The lock this environment was installed from: the GPU's where an NVIDIA GPU is, as the Makefile chooses."""
    lock = project_root / "requirements" / ("gpu.txt" if shutil.which("nvidia-smi") else "cpu.txt")
    if not lock.is_file():
        raise Unknown(f"no {lock.parent.name}/{lock.name} beside the installed package")
    return lock


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None  # not installed is the fact itself


def _busy_percent() -> float:
    """Of the cores that this process may use, over the next moment."""
    percents = psutil.cpu_percent(BUSY_SAMPLE_S, percpu=True)
    own = [percents[core] for core in os.sched_getaffinity(0) if core < len(percents)] or percents
    return sum(own) / len(own)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return match.group(1).strip() if match else platform.machine()
