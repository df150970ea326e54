"""For folders whose tests run kernels: on an NVIDIA GPU (pytest -m gpu), or on the CPU under Triton's interpreter.

Triton decides when it is imported, so the interpreter (TRITON_INTERPRET=1) needs a process of its own:
tests/kernels/test_interpreted.py and tests/test_plugin_in_server_process.py start one.
"""

import os
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def mark_gpu(items: list[pytest.Item], folder: Path) -> None:
    """Tests of `folder` need a GPU where they are not interpreted."""
    for item in items:
        if not INTERPRETED and folder in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> str:
    if INTERPRETED:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU, and torch sees none")
    return "cuda"
