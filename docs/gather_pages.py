"""Gathers what the site shows into build/pages, where every link is what it is in the repository.

README is its first page. `make docs` calls this, then Zensical.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from distoptim.cli import application

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "pages"
# Of the files that git knows.
SHOWN = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CITATION.cff", "LICENSE"),
    *("docs/*", ":!docs/*.py", "examples/*", "results/*.md", "results/*.png"),
)


def tracked() -> list[Path]:
    """Files of the repository that are shown, also those not yet committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *SHOWN]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [Path(line) for line in found.splitlines() if (ROOT / line).is_file()]


def command_line() -> str:
    """A page of all commands and options, from the definitions that `--help` is made of."""
    page = application().generate_docs()
    # Its own table of contents says no more than the list of commands below it.
    return "# Command line\n\n" + page[page.index("**Commands**") :]


def main() -> None:
    """Copy them anew."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for path in tracked():
        target = PAGES / ("index.md" if path == Path("README.md") else path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, target)
    (PAGES / "docs" / "reference" / "command-line.md").write_text(command_line())


if __name__ == "__main__":
    main()
