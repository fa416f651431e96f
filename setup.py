"""What pyproject.toml cannot say: a README whose links and pictures lead somewhere from a package index too."""

import re
from pathlib import Path
from urllib.parse import urljoin

from setuptools import setup

ROOT = Path(__file__).parent


def first(pattern: str, name: str) -> str:
    """What `pattern` finds in a file of the repository."""
    found = re.search(pattern, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise ValueError(f"{name} has no {pattern}")
    return found[1]


SOURCE = first('^Source = "(.+)"', "pyproject.toml")
VERSION = first('^__version__ = "(.+)"', "src/distoptim/version.py")


def absolute(link: re.Match[str]) -> str:
    """Into the repository as it was at this version: to a page of it, or to a picture's bytes."""
    kind = "raw" if link[1].endswith((".png", ".svg")) else "blob"
    return f"]({urljoin(f'{SOURCE}/{kind}/v{VERSION}/README.md', link[1])})"


README = re.sub(r"\]\(([^)\s]+)\)", absolute, (ROOT / "README.md").read_text(encoding="utf-8"))

setup(long_description=README, long_description_content_type="text/markdown")
