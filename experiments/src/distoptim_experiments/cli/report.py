"""The subcommand that turns records into a report."""

from __future__ import annotations

from pathlib import Path

import click

from distoptim_experiments.report import report as writing
from distoptim_experiments.report import runs


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Where to write.  [default: the folder of the records]",
)
def report(*, folder: Path, out: Path | None) -> None:
    """Tables and figures of the runs recorded below FOLDER, as report.md and report.html."""
    found = runs.read(folder)
    for note in found.notes:
        click.echo(note, err=True)
    for path in writing.write(found, out or folder):
        click.echo(f"report: {path}")
