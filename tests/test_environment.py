"""pyproject.toml, both locks, environment.yml and the Makefile say the same, and what is installed is what they say."""

import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = ("cpu", "gpu")


def lock_text(name: str) -> str:
    return (ROOT / "requirements" / f"{name}.txt").read_text()


def lock(name: str) -> dict[str, Version]:
    lines = [line for line in lock_text(name).splitlines() if line and not line.startswith("#")]
    pins = [re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", line) for line in lines]
    assert all(pins), "a lock has exact versions and nothing else"
    versions = {canonicalize_name(pin[1]): Version(pin[2]) for pin in pins if pin}
    assert len(versions) == len(pins), "a package is locked twice"
    return versions


def asked_for() -> list[Requirement]:
    return [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]


@pytest.mark.parametrize("name", LOCKS)
@pytest.mark.parametrize("requirement", asked_for(), ids=lambda requirement: requirement.name)
def test_both_locks_satisfy_pyproject(name: str, requirement: Requirement) -> None:
    version = lock(name)[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version, prereleases=True)


def test_both_locks_have_the_same_sglang_and_transformers() -> None:
    cpu, gpu = lock("cpu"), lock("gpu")
    assert str(cpu["sglang"]) == str(gpu["sglang"]) == "0.5.17"
    assert cpu["transformers"] == gpu["transformers"]


def sglang_pins() -> dict[str, Requirement]:
    """What SGLang itself asks for on Linux x86-64 with Python 3.12."""
    target = {"sys_platform": "linux", "platform_machine": "x86_64", "python_version": "3.12", "extra": ""}
    pins = [Requirement(text) for text in metadata.requires("sglang") or []]
    return {canonicalize_name(pin.name): pin for pin in pins if pin.marker is None or pin.marker.evaluate(target)}


def test_the_gpu_lock_is_what_sglang_pins() -> None:
    gpu = lock("gpu")
    unmet = [
        str(pin)
        for name, pin in sglang_pins().items()
        if name not in gpu or not pin.specifier.contains(gpu[name], prereleases=True)
    ]
    assert unmet == []


def test_the_cpu_lock_states_its_torch_deviation() -> None:
    version, pin = lock("cpu")["torch"], sglang_pins()["torch"]
    assert version.local == "cpu"
    assert not pin.specifier.contains(version), "no deviation is left: drop the statement"
    header = lock_text("cpu").partition("\naccelerate==")[0]
    assert f"SGLang 0.5.17 pins torch{pin.specifier}" in header.replace("\n# ", " ")
    assert f"torch=={version}" in header


def test_every_other_pin_of_sglang_in_the_cpu_lock_is_kept() -> None:
    deviating = {
        name
        for name, version in lock("cpu").items()
        if name in sglang_pins() and not sglang_pins()[name].specifier.contains(version, prereleases=True)
    }
    assert deviating == {"torch", "soundfile"}


def test_conda_reads_the_cpu_lock() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    by_pip = next(entry["pip"] for entry in conda if isinstance(entry, dict))
    files = [entry.split()[1] for entry in by_pip if entry.startswith("-r")]
    assert files == ["requirements/cpu.txt"]
    assert "-e ." in by_pip
    plain = dict(entry.split("=", 1) for entry in conda if isinstance(entry, str))
    assert f"{plain['python']}.0" in Requirement(f"python{PROJECT['requires-python']}").specifier
    for tool in ("pip", "setuptools"):
        assert lock("cpu")[tool] in Requirement(f"{tool}=={plain[tool]}").specifier


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="not in an environment of its own")
def test_what_is_installed_is_what_the_lock_says() -> None:
    name = "cpu" if Version(metadata.version("torch")).local == "cpu" else "gpu"
    # This environment's own folder only: setuptools puts older copies it carries on sys.path.
    found_here = metadata.distributions(path=[sysconfig.get_path("purelib")])
    installed = {canonicalize_name(found.name): Version(found.version) for found in found_here}
    differing = {
        package: (str(version), str(installed.get(package)))
        for package, version in lock(name).items()
        if package not in ("pip", "setuptools") and installed.get(package) != version
    }
    assert differing == {}


def test_the_plugin_is_where_sglang_looks() -> None:
    """That it loads there is for the tests that start a server."""
    (entry,) = [found for found in metadata.entry_points(group="sglang.srt.plugins") if found.name == "kvtuner"]
    assert (entry.module, entry.attr) == ("kvtuner_sglang.plugin.entry", "register")
    assert importlib.util.find_spec(entry.module) is not None


def test_the_distribution_carries_the_stand_ins_but_no_package_named_kernels(tmp_path: Path) -> None:
    building = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    source = tmp_path / "source"
    for name in ("src", "kernels"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*building, str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    files = set(zipfile.ZipFile(wheel).namelist())
    standins = "kvtuner_sglang/cpu_engine/standins"
    assert {f"{standins}/kvtuner_standin.py", f"{standins}/sgl_kernel/__init__.py"} <= files
    assert "kvtuner_triton/__init__.py" in files
    assert {file.partition("/")[0] for file in files if file.endswith(".py")} == {"kvtuner_sglang", "kvtuner_triton"}
