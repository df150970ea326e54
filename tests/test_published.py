"""What is published is whole: paper.check finds nothing wrong with it."""

from pathlib import Path

import pytest

from kvtuner_sglang.evidence.published import SUMS_FILE, publishable, slug
from kvtuner_sglang.kernel_bench.tidy import gpu_of
from kvtuner_sglang.paper.check import folder_problems
from kvtuner_sglang.paper.published_folders import FOLDERS, WAITING

PUBLISHED = Path(__file__).parents[1] / "runs" / "published"
DIRECTORIES = sorted(path for path in PUBLISHED.iterdir() if path.is_dir())


def test_every_published_folder_is_known_and_has_checksums():
    assert DIRECTORIES
    assert {path.name for path in DIRECTORIES} <= FOLDERS.keys()
    assert [path for path in DIRECTORIES if not (path / SUMS_FILE).exists()] == []


@pytest.mark.parametrize("folder", DIRECTORIES, ids=lambda path: path.name)
def test_its_files_records_and_tables_are_those_that_were_published(folder):
    if {path.name for path in folder.rglob("*") if path.is_file()} - WAITING:
        assert list(folder_problems(folder)) == []


def test_a_run_of_the_kernels_is_named_like_its_gpu():
    for path in PUBLISHED.glob("kernels/*/record.json"):
        assert path.parent.name == slug(gpu_of(publishable(path.parent, "kernels")))
