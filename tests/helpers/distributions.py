"""The two distributions as a user gets them: built, and installed with what their metadata names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SOURCES = (
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "conftest.py",
    "README.md",
    "SECURITY.md",
    "experiments",
    "pyproject.toml",
    "setup.py",
    "src",
    "tests",
)


def build(folder: Path) -> None:
    """Put sdist and wheel of both distributions into `folder / "dist"`, each wheel from its sdist."""
    # Built from a copy, since building leaves files in the source tree, which other tests read.
    copy = folder / "source"
    ignore = shutil.ignore_patterns("*.egg-info", "__pycache__", "build", ".*_cache")
    copy.mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, copy / name, ignore=ignore)
        else:
            shutil.copy(path, copy / name)
    for source in (copy, copy / "experiments"):
        command = ["-m", "build", "--no-isolation", "--outdir", folder / "dist", source]
        subprocess.run([sys.executable, *command], check=True, capture_output=True, timeout=300)


def install(folder: Path, wheels: Iterable[Path], wanted: str) -> Path:
    """Add `wheels` to an environment, and of the packages around us only what `wanted` needs.

    Args:
        wanted: a requirement, as "distoptim[cli]".

    Returns:
        The folder of its commands.
    """
    if not folder.exists():
        venv.create(folder)
    (site,) = folder.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install"]
    options = ["--quiet", "--no-index", "--no-deps"]
    if wheels := list(wheels):
        subprocess.run([*pip, *options, *wheels], env=bare(), check=True, timeout=300)
    for package in needed(wanted, [str(site), *sys.path]):
        for file in package.files or ():
            top = site / file.parts[0]
            # Packages may share a folder; a path with ".." leads to the commands.
            if file.parts[0] != ".." and not top.exists():
                top.symlink_to(package.locate_file(file.parts[0]))
    return folder / "bin"


def bare() -> dict[str, str]:
    """Our environment variables, but for the path that leads to the sources."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def needed(wanted: str, path: list[str]) -> list[metadata.Distribution]:
    """All distributions on `path` that the requirement `wanted` leads to."""
    found: dict[tuple[str, frozenset[str]], metadata.Distribution] = {}
    todo = [Requirement(wanted)]
    while todo:
        requirement = todo.pop()
        key = (requirement.name, frozenset(requirement.extras))
        if key in found:
            continue
        found[key] = next(iter(metadata.distributions(name=requirement.name, path=path)))
        extras = {"", *requirement.extras}
        for text in found[key].requires or ():
            further = Requirement(text)
            marker = further.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(further)
    return list(found.values())
