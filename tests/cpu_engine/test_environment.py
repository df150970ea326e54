"""What a CPU server process is given: cores, the stand-ins in its path, and the lines for a shell."""

import os
import subprocess
import sys

import pytest

from kvtuner_sglang.cpu_engine import environment
from kvtuner_sglang.cpu_engine.environment import STANDINS, cpu_server_arguments, cpu_server_environment


@pytest.mark.parametrize(
    ("cores", "tp_size", "ranks_on_host", "node_rank", "bind", "threads"),
    [
        (2, 1, 1, 0, "0,1", "2"),  # alone: every core
        (2, 2, 2, 0, "0|1", "1"),
        (2, 2, 4, 0, "0|1", "1"),  # more ranks than cores: they share
        (2, 2, 4, 1, "0|1", "1"),
        (8, 2, 4, 0, "0,1|2,3", "2"),
        (8, 2, 4, 1, "4,5|6,7", "2"),  # the second node takes the other half
        (1, 2, 2, 0, "0|0", "1"),
    ],
)
def test_ranks_divide_the_cores(
    monkeypatch: pytest.MonkeyPatch,
    cores: int, tp_size: int, ranks_on_host: int, node_rank: int, bind: str, threads: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda pid: set(range(cores)))
    given = cpu_server_environment(tp_size, ranks_on_host, node_rank)
    assert given["SGLANG_CPU_OMP_THREADS_BIND"] == bind
    assert given["OMP_NUM_THREADS"] == threads


def test_the_stand_ins_come_before_the_callers_own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    assert cpu_server_environment(1, 1, 0)["PYTHONPATH"].split(os.pathsep) == [str(STANDINS), "/mine"]
    monkeypatch.delenv("PYTHONPATH")
    assert cpu_server_environment(1, 1, 0)["PYTHONPATH"] == str(STANDINS)


def printed(*arguments: str) -> str:
    command = [sys.executable, "-m", "kvtuner_sglang.cpu_engine", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_a_shell_that_evaluates_the_printed_lines_has_that_environment() -> None:
    wanted = cpu_server_environment(2, 4, 1, interface="eth 0;x")
    lines = printed("--tp", "2", "--ranks-on-host", "4", "--node-rank", "1", "--interface", "eth 0;x")
    shell = subprocess.run(["sh", "-c", 'eval "$0"; env', lines], check=True, capture_output=True, text=True)
    assert wanted.items() <= dict(line.partition("=")[::2] for line in shell.stdout.splitlines()).items()
    assert " ".join(cpu_server_arguments()) in lines


@pytest.mark.parametrize("wrong", [["--tp", "0"], ["--node-rank", "-1"], ["--ranks-on-host", "0"]])
def test_impossible_counts_are_refused(wrong: list[str]) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        printed(*wrong)
    assert refused.value.returncode == 2
