"""How a rank refuses to start: its sentence on stderr, then its launcher and all other ranks end."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

from kvtuner_sglang.errors import UserError


@contextlib.contextmanager
def refusing_in_one_sentence() -> Iterator[None]:
    """In a scheduler process: a UserError becomes one line, not SGLang's traceback of the same.

    SIGQUIT is SGLang's own signal from a rank to its launcher: the launcher then kills every process it started and
    ends with a non-zero exit code.
    """
    try:
        yield
    except UserError as error:
        sys.stderr.write(f"kvtuner: {error}\n")
        sys.stderr.flush()
        os.kill(os.getppid(), signal.SIGQUIT)
        raise SystemExit(1) from error
