"""The subcommand that turns records into a report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def report(
    folder: Path,
    /,
    *,
    out: Annotated[Path | None, Parameter(metavar="FOLDER")] = None,
    force: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Tables and figures of the runs below FOLDER, as report.md and report.html.

    The runs are those recorded there, and those in files `runs.csv`.

    Args:
        folder: Of the records.
        out: Where to write. [default: the folder of the records]
        force: Overwrite files of these names that this command did not make.
    """
    # Drawing takes longer to import than the help to show.
    from distoptim_experiments import frames
    from distoptim_experiments.report import report as writing
    from distoptim_experiments.report import runs

    found = runs.named(frames.read(folder))
    for note in found.notes:
        print(note, file=sys.stderr)
    for path in writing.write(found, out or folder, force=force):
        print(f"report: {path}")
