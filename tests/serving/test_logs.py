"""Reading a node's log for the one line that matters."""

from pathlib import Path

import pytest

from kvtuner_sglang.serving import logs

TRACEBACK = """[2026-11-22 23:47:10 TP1] Load weight begin.
[2026-11-22 23:47:15 TP1] Scheduler hit an exception: Traceback (most recent call last):
  File "scheduler.py", line 1, in run
RuntimeError: [../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:31555
some farewell
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "node0.log"


def test_no_log_yet(log: Path) -> None:
    assert (logs.refusal(log), logs.last_error(log), logs.last_step(log)) == (None, None, "importing SGLang")


def test_a_refusal_is_found_among_other_lines(log: Path) -> None:
    log.write_text("warning: x\nkvtuner: 3 bits cannot be stored: choose 16, 8, 4 or 2.\nTraceback\n")
    assert logs.refusal(log) == "3 bits cannot be stored: choose 16, 8, 4 or 2."


def test_a_logged_remark_of_the_plugin_is_no_refusal(log: Path) -> None:
    log.write_text("[2026-11-22 23:47:10] kvtuner: --kvtuner-kv-gib is not set; each rank takes 1 GiB.\n")
    assert logs.refusal(log) is None


@pytest.mark.parametrize(("text", "error"), [
    (TRACEBACK, "RuntimeError: [../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:31555"),
    ("launch_server.py: error: argument --x: invalid choice: 3\n", "error: argument --x: invalid choice: 3"),
    ("torch.OutOfMemoryError: no memory\n", "torch.OutOfMemoryError: no memory"),
    ("[2026-11-22 23:47:15] ValueError: bad\n", "ValueError: bad"),
    ("all is well\n", None),
])
def test_the_last_error(log: Path, text: str, error: str | None) -> None:
    log.write_text(text)
    assert logs.last_error(log) == error


@pytest.mark.parametrize(("text", "line"), [
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.\nRuntimeError: peer is gone\n",
     "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."),
    ("[2026-11-22 23:47:15 TP0] RuntimeError: [enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't "
     "allocate memory: you tried to allocate 9 bytes.\n",
     "RuntimeError: [enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you "
     "tried to allocate 9 bytes."),
    ("RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.\n",
     "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static."),
    ("[2026-11-22 23:47:15] KV cache pool is full. Retract requests.\n" + TRACEBACK, None),
    ("a remark on running out of memory\nValueError: bad\n", None),
])
def test_a_lack_of_memory_is_told_from_its_effects(log: Path, text: str, line: str | None) -> None:
    log.write_text(text)
    assert logs.out_of_memory(log) == line


def test_the_last_step_is_told_from_other_lines(log: Path) -> None:
    log.write_text(TRACEBACK + "[2026-11-22 23:47:16 PP0 TP0] Load weight end. elapsed=2.18 s\n"
                   "[2026-11-22 23:47:17] Ignore import error x\n[2026-11-22 23:47:17] server_args=Server\n")
    assert logs.last_step(log) == "Load weight end. elapsed=2.18 s"


def test_a_long_log_is_read_from_its_end(log: Path) -> None:
    log.write_text("x" * (logs.TAIL_BYTES * 2) + "\nkvtuner: no.\n")
    assert logs.refusal(log) == "no."
