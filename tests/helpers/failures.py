"""docs/failures.md says what users will see; tests that raise it hold the two together."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "failures.md"
# What differs from case to case: names, numbers, types, shapes.
_VARIES = re.compile(r"(?<!\w)'[^']+'|\"[^\"]+\"|\d+|torch\.\w+|\[[^\]]*\]|…")


def rows() -> list[str]:
    """The texts of errors, from the tables' second column."""
    table = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return [text for cells in table for text in re.findall(r"`(.+)`$", cells[1])]


def is_documented(message: str, among: Sequence[str] = ()) -> bool:
    """Whether a row, of these or of all, has this text, up to what varies."""
    return any(
        re.search(".+?".join(map(re.escape, _VARIES.split(row))), message, re.DOTALL)
        for row in among or rows()
    )


@contextlib.contextmanager
def documented(match: str) -> Iterator[pytest.ExceptionInfo[ValueError]]:
    """The block raises such a ValueError, and a row of the page has its text."""
    with pytest.raises(ValueError, match=match) as caught:
        yield caught
    assert is_documented(str(caught.value)), f"no row of {PAGE.name} says: {caught.value}"
