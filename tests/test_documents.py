"""What README.md, ARTIFACT.md and docs/ point to exists, and their commands are ones that this program takes."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from kvtuner_sglang import command_line

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "ARTIFACT.md", *sorted((ROOT / "docs").glob("*.md")),
             *sorted((ROOT / "runs" / "published").glob("*/README.md"))]
EXAMPLES = {"NAME": "name", "CHECKPOINT": "/checkpoint"}


def commands(text: str) -> list[list[str]]:
    """The words of every line of code that runs Python, without comment and prompt; continued lines are joined."""
    blocks = re.findall(r"(?m)^```\w*\n(.*?)^```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))
            and Path(words[0]).name in ("python", "python3")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_commands_are_taken():
    """Of run.py: every job composes to a configuration. Of our own modules: there is one of that name."""
    found = {tuple(words) for path in DOCUMENTS for words in commands(path.read_text())}
    assert len(found) > 10
    for words in sorted(found):
        if words[1] == "run.py":
            given = [with_example(word) for word in words[2:] if word != "-m"]
            for job in command_line.jobs(given, ROOT / "conf", multirun="-m" in words):
                command_line.load(job, ROOT / "conf")
        elif words[1] == "-m" and words[2].startswith("kvtuner_sglang"):
            assert find_spec(words[2]), words


def with_example(word: str) -> str:
    name, _, value = word.partition("=")
    return f"{name}={EXAMPLES[value]}" if value in EXAMPLES else word


def test_the_parser_sees_commands():
    text = "```\n.venv/bin/python run.py -m quant=kv4,kv8   # a sweep\npip install x\n```\n`python run.py no`\n"
    assert commands(text) == [[".venv/bin/python", "run.py", "-m", "quant=kv4,kv8"]]
