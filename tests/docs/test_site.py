"""What the site's menu and its reference have; `make docs` tries links, names and formulas."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from pathlib import Path

import distoptim
from distoptim import comm, simulator

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
# Made by docs/gather_pages.py: of the commands themselves, and of a notebook.
GENERATED = {"docs/reference/command-line.md", "examples/one_round.md"}


def paths(nav):
    """All pages of a menu, in its order."""
    for entry in nav:
        for target in entry.values() if isinstance(entry, dict) else [entry]:
            yield from paths(target) if isinstance(target, list) else [target]


def test_every_page_is_in_the_menu_and_the_menu_has_no_other():
    config = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]
    shown = set(paths(config["nav"]))
    pages = {
        path.relative_to(ROOT).as_posix()
        for path in [*(ROOT / "docs").glob("*.md"), *REFERENCE.glob("*.md")]
    }
    assert shown >= pages
    assert {"index.md", *GENERATED} < shown
    for page in shown - {"index.md", *GENERATED}:
        assert (ROOT / page).is_file(), page


def test_every_public_name_is_in_the_reference_once():
    shown = Counter(
        name
        for page in REFERENCE.glob("*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
    )
    assert set(shown.values()) == {1}
    documented = {name.rpartition(".")[2] for name in shown}
    for package in (distoptim, comm, simulator):
        ours = {name for name in package.__all__ if not of_torch(getattr(package, name))}
        assert ours - {"__version__"} <= documented


def test_every_algorithm_is_drawn():
    drawn = {path.stem for path in (ROOT / "docs" / "algorithms").glob("*.svg")}
    assert drawn == {algorithm.__name__ for algorithm in distoptim.ALGORITHMS.values()}
    page = (ROOT / "docs" / "algorithms.md").read_text()
    assert all(f"](algorithms/{name}.svg)" in page for name in drawn)


def of_torch(value):
    """Torch's own classes, which `comm` hands on for types."""
    return getattr(value, "__module__", "").startswith("torch.")
