"""A copy of what the paper is made from, to break on purpose."""

import shutil
from pathlib import Path

import pytest

from paper_project import ROOT


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """paper, runs/published, README.md and ARTIFACT.md as they are here, in a folder of their own."""
    for name in ("paper", "runs/published"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "conf").symlink_to(ROOT / "conf")  # the same place, so that it is composed once
    for name in ("README.md", "ARTIFACT.md"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path
