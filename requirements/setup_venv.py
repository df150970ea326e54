"""Builds `.venv` from a lock and installs this project into it; does nothing, in milliseconds, when that is done.

    python requirements/setup_venv.py          what the Makefile calls; takes the lock by whether an NVIDIA GPU is there

Needs only the standard library of Python 3.11 or 3.12.  A stamp inside `.venv`, written last, holds the hashes of the
lock and of pyproject.toml: without it a `.venv` counts as unfinished and is built again, and a changed pyproject.toml
alone only installs the project again.  Exit code 1 and one sentence on failure.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
STAMP = VENV / "kvtuner-setup.json"
PYPROJECT = ROOT / "pyproject.toml"
# PyPI has no CPU build of torch for Linux; PyTorch's own index has.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Three at a time keep two cores busy: one waits for the network while two unpack and compile.
WORKERS = 3
PROGRESS_EVERY_S = 5
NEVER_IMPORTED = "|".join(
    (
        "/tests?/",
        "/sglang/multimodal_gen/",
        "/torch/testing/",
        "/transformers/models/(?!auto/|llama/|qwen|gemma|mistral|__init__)",
    )
)


class SetupError(Exception):
    """One sentence that says what to change."""


def find_lock() -> Path:
    """The GPU lock if the driver shows a GPU, the CPU lock otherwise."""
    smi = shutil.which("nvidia-smi")
    gpu = smi is not None and subprocess.run([smi, "-L"], capture_output=True, text=True).stdout.startswith("GPU ")
    return ROOT / "requirements" / ("gpu.txt" if gpu else "cpu.txt")


def fingerprint(lock: Path) -> dict[str, str]:
    """What decides whether `.venv` is up to date."""
    return {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "lock": f"{lock.name} {hashlib.sha256(lock.read_bytes()).hexdigest()}",
        "pyproject": hashlib.sha256(PYPROJECT.read_bytes()).hexdigest(),
    }


def read_stamp() -> dict[str, str]:
    try:
        return json.loads(STAMP.read_text())
    except (FileNotFoundError, ValueError):
        return {}


def pip(*arguments: str) -> list[str]:
    return [str(VENV / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", *arguments]


def run(command: list[str], log: Path) -> int:
    with log.open("ab") as stream:
        return subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT).returncode


def run_or_stop(what: str, command: list[str], log: Path) -> None:
    if run(command, log):
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SetupError(f"{tail}\n{what} failed; the lines above say why, the whole log is {log}.")


def split(lock: Path) -> tuple[list[str], str, list[list[str]]]:
    """([pip, setuptools], torch, the rest in one list per worker) of a lock."""
    pins = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    tools = [pin for pin in pins if pin.startswith(("pip==", "setuptools=="))]
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    # By weight rather than in turn: these few are most of the bytes, so they begin first and apart from each other.
    heavy = ["triton", "sglang", "transformers", "scipy", "pyarrow", "pandas", "flashinfer-python", "sympy"]
    rest = [pin for pin in pins if pin not in (*tools, torch)]
    rest.sort(key=lambda pin: heavy.index(pin.split("==")[0]) if pin.split("==")[0] in heavy else len(heavy))
    return tools, torch, [rest[n::WORKERS] for n in range(WORKERS)]


def install_torch(pin: str, log: Path) -> None:
    """torch first: the one package that may need another index."""
    command = pip("install", "--no-deps", pin)
    if "+cpu" in pin and run(command, log):
        command += ["--index-url", TORCH_CPU_INDEX]
    run_or_stop(f"Installing {pin}", command, log)


def fetched(log: Path) -> list[str]:
    """The packages that pip has begun with, from its log; a wheel on this disk is "processed", any other collected."""
    begun = re.findall(r"^(?:Collecting|Processing) (?:\S*/)?(\S+)", log.read_text(errors="replace"), re.MULTILINE)
    return [re.split("==|-[0-9]", name)[0] for name in begun]


def install_in_parallel(groups: list[list[str]], started: float) -> None:
    """Several pips at once, each with its own packages, which keeps every core busy."""
    logs = [VENV / f"setup-{n}.log" for n in range(len(groups))]
    jobs = []
    for group, log in zip(groups, logs, strict=True):
        command = pip("install", "--no-deps", "--no-build-isolation", "--no-compile", "--progress-bar", "off", *group)
        jobs.append(subprocess.Popen(command, stdout=log.open("wb"), stderr=subprocess.STDOUT, cwd=ROOT))
    total = sum(map(len, groups))
    try:
        while any(job.poll() is None for job in jobs):
            time.sleep(PROGRESS_EVERY_S)
            names = [fetched(log) for log in logs]
            count = sum(map(len, names))
            now = ", ".join(group[-1] for group, job in zip(names, jobs, strict=True) if group and job.poll() is None)
            doing = f"fetching, now {now}" if count < total else "unpacking"
            say(started, f"{count} of {total} packages: {doing}")
    finally:
        for job in jobs:
            if job.poll() is None:
                job.terminate()
                job.wait()
    for job, log in zip(jobs, logs, strict=True):
        if job.returncode:
            run_or_stop("Installing the lock", ["false"], log)


def compile_bytecode(log: Path) -> None:
    """Compile what is imported, on all cores; without it every start of a server takes half a minute longer.

    Left out are packages' own tests and what never loads here: a third of all files.
    """
    site = next(VENV.glob("lib/python*/site-packages"))
    command = [str(VENV / "bin" / "python"), "-m", "compileall", "-q", "-j", "0", "-x", NEVER_IMPORTED, str(site)]
    # Its exit code says that some file is no valid Python, which packages have among their templates.
    run(command, log)


def install_project(log: Path) -> None:
    command = pip("install", "--no-deps", "--no-build-isolation", "--editable", ".")
    run_or_stop("Installing the project itself", command, log)


def say(started: float, text: str) -> None:
    print(f"setup {time.monotonic() - started:4.0f} s  {text}", flush=True)  # noqa: T201 (this is the command's output)


def build(lock: Path, wanted: dict[str, str]) -> None:
    started, log = time.monotonic(), VENV / "setup.log"
    tools, torch, groups = split(lock)
    count = sum(map(len, groups)) + len(tools) + 1
    say(started, f"new .venv from requirements/{lock.name}: {count} packages, 2 to 4 minutes on 2 cores")
    shutil.rmtree(VENV, ignore_errors=True)
    # Not sys.executable: that may be the very .venv which has just been removed.
    python = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    subprocess.run([str(python), "-m", "venv", str(VENV)], check=True)
    # A new pip takes a third of the time of the one that Python brings; the few packages without a wheel build with
    # this setuptools, not each with a fresh download of one.
    run_or_stop("Installing pip and setuptools", pip("install", "--no-deps", *tools), log)
    say(started, torch)
    install_torch(torch, log)
    install_in_parallel(groups, started)
    say(started, "compiling bytecode")
    compile_bytecode(log)
    install_project(log)
    STAMP.write_text(json.dumps(wanted))
    say(started, "done")


def ensure(lock: Path) -> None:
    """Brings `.venv` up to date with `lock` and pyproject.toml."""
    if sys.version_info[:2] not in ((3, 11), (3, 12)):
        raise SetupError(
            f"This is Python {sys.version.split()[0]}, and SGLang's pins need 3.11 or 3.12: "
            "name one of these, for example make run PYTHON=python3.12."
        )
    wanted = fingerprint(lock)
    if read_stamp() == wanted:
        return
    # make run and make test may start together: the second waits and then finds the work done.
    with (ROOT / ".venv.lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        stamp = read_stamp()
        if stamp == wanted:
            return
        if stamp and stamp == {**wanted, "pyproject": stamp.get("pyproject")}:
            STAMP.unlink()
            install_project(VENV / "setup.log")
            STAMP.write_text(json.dumps(wanted))
        else:
            build(lock, wanted)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lock", type=Path, help="a lock other than the one this machine would get")
    arguments = parser.parse_args()
    # A user's PYTHONPATH or pip target would leak into the new environment.
    for name in ("PYTHONPATH", "PIP_TARGET", "PIP_USER"):
        os.environ.pop(name, None)
    try:
        ensure(arguments.lock or find_lock())
    except SetupError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("setup interrupted; the next call starts it again\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
