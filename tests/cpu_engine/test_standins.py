"""The stand-ins let SGLang load on a CPU, refuse to be called, and are out of reach of everyone else."""

import importlib.util
import os
import subprocess
import sys

import pytest

from kvtuner_sglang.cpu_engine.environment import STANDINS, cpu_server_environment

PACKAGES = sorted(entry.name for entry in STANDINS.iterdir() if (entry / "__init__.py").is_file())


def run_in_server_environment(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **cpu_server_environment(1, 1, 0)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_these_and_no_others() -> None:
    assert PACKAGES == ["IPython", "sgl_kernel", "torchvision"]


@pytest.mark.parametrize("package", PACKAGES)
def test_names_and_submodules_exist_but_calling_one_is_refused(package: str) -> None:
    code = f"""
import {package}
import {package}.any.thing as below
from {package} import kernel
from {package}.any.thing import another
assert below.another is another and kernel is not another
assert kernel.SOME_MODE is kernel.SOME_MODE
annotation = kernel | None
assert not hasattr(kernel, "__wrapped__") and not hasattr({package}, "__path_to_nothing__")
for call in (kernel, another, kernel.method):
    try:
        call(1, flag=True)
    except NotImplementedError as error:
        print(error)
"""
    said = run_in_server_environment(code).splitlines()
    assert [line.split()[0] for line in said] == [
        f"{package}.kernel", f"{package}.any.thing.another", f"{package}.kernel.method",
    ]  # fmt: skip
    assert all("is not in a CPU build of SGLang" in line for line in said)


def test_sglangs_server_loads_with_them() -> None:
    """Also what no other test would show: everything else that a server imports is in the CPU lock."""
    code = "import sglang.srt.entrypoints.http_server, sglang.srt.managers.scheduler as s; print(s.Scheduler.__name__)"
    assert run_in_server_environment(code).strip() == "Scheduler"


def test_without_the_environment_they_are_out_of_reach() -> None:
    """A process that was not given the path, as a GPU server is not, finds no stand-in whatever it imports of ours."""
    code = (
        "import importlib.util, sys, kvtuner_sglang.cpu_engine.environment as e\n"
        "specs = [importlib.util.find_spec(name) for name in ('kvtuner_standin', 'sgl_kernel', 'torchvision')]\n"
        "assert all(spec is None or str(e.STANDINS) not in str(spec.origin) for spec in specs), specs\n"
        "assert str(e.STANDINS) not in sys.path"
    )
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], check=True, env=own)
    assert importlib.util.find_spec("kvtuner_sglang.cpu_engine.standins.kvtuner_standin") is not None
