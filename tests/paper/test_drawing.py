"""The figures of the paper are those that runs/published gives, to the byte."""

import re
from pathlib import Path

import pytest

from kvtuner_sglang.paper.drawing import FIGURES, draw_figures
from paper_project import ROOT


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("figures")
    (into / "gone_figure.png").write_bytes(b"of a folder that was taken back")
    (into / "notes.txt").write_text("not a figure")
    draw_figures(ROOT, into)
    return into


def test_committed_figures_are_those_drawn_anew(drawn):
    anew = {path.name: path.read_bytes() for path in drawn.iterdir() if path.suffix != ".txt"}
    assert anew
    committed = {path.name: path.read_bytes() for path in (ROOT / FIGURES).iterdir()}
    assert anew.keys() == committed.keys()
    assert [name for name in anew if anew[name] != committed[name]] == []


def test_only_figures_are_removed(drawn):
    assert not (drawn / "gone_figure.png").exists()
    assert (drawn / "notes.txt").exists()


def test_every_figure_is_in_the_paper(drawn):
    """By name, or with all of its folder's."""
    text = "".join(path.read_text() for path in (ROOT / "paper" / "sections").glob("*.typ"))
    named = set(re.findall(r'#drawn\("(\w+)"', text))
    whole = set(re.findall(r'#figures-of\("(\w+)"', text))
    for name in {path.stem for path in drawn.glob("*.pdf")}:
        folder = name.split("_")[0]
        assert name in named or folder in whole or not (ROOT / "paper" / "sections" / f"{folder}.typ").exists()
    assert all((drawn / f"{name}.pdf").exists() for name in named)
