"""The subcommand that turns records into a report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def report(
    folder: Path, /, *, out: Annotated[Path | None, Parameter(metavar="FOLDER")] = None
) -> None:
    """Tables and figures of the runs recorded below FOLDER, as report.md and report.html.

    Args:
        folder: Of the records.
        out: Where to write. [default: the folder of the records]
    """
    # Drawing takes longer to import than the help to show.
    from distoptim_experiments.report import report as writing
    from distoptim_experiments.report import runs

    found = runs.read(folder)
    for note in found.notes:
        print(note, file=sys.stderr)
    for path in writing.write(found, out or folder):
        print(f"report: {path}")
