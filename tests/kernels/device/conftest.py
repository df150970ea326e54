"""These tests run kernels: see kernel_device.py."""

from pathlib import Path

import pytest

from kernel_device import device, mark_gpu
from kernel_places import place

__all__ = ["device", "place"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_gpu(items, Path(__file__).parent)
