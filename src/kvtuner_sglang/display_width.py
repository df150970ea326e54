"""Padding by what a terminal shows: a Chinese character is as wide as two Latin ones."""

from unicodedata import east_asian_width


def display_width(text: str) -> int:
    """Columns that a monospaced font needs for `text`."""
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def ljust(text: str, width: int) -> str:
    return text + " " * (width - display_width(text))


def center(text: str, width: int) -> str:
    """As str.center, which counts characters."""
    return text.center(width - display_width(text) + len(text))
