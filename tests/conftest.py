"""What tests of several folders share."""

import signal
from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def hear_ctrl_c() -> Callable[[], None]:
    """A preexec_fn: a shell's background job, as which tests may run, hands SIGINT down as ignored, nohup SIGHUP."""

    def hear_ctrl_c() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    return hear_ctrl_c
