"""The subcommand that shows what each worker of a run did when."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def timeline(
    folder: Path,
    /,
    *,
    out: Annotated[Path | None, Parameter(metavar="FOLDER")] = None,
    seconds: Annotated[str | None, Parameter(metavar="FIRST:LAST")] = None,
) -> None:
    """Draw the workers of a run as rows: computation, waiting, means in flight, merges, joins and losses.

    Writes timeline.png, and timeline.html with sums, which asks for no other file.

    Args:
        folder: Of a run made with --timeline, or what `optimizer.record()` was given.
        out: Where to write. [default: the same folder]
        seconds: Which part. [default: all]
    """
    # Drawing takes longer to import than the help to show.
    from distoptim_experiments.report import timeline as drawn

    part = None
    if seconds is not None:
        try:
            first, last = map(float, seconds.split(":"))
        except ValueError:
            raise ValueError(f"--seconds {seconds}: allowed is FIRST:LAST, as 10:12.5") from None
        part = (first, last)
    where = out or folder
    drawn.write(drawn.read(folder), where, seconds=part)
    print(f"picture: {where / drawn.PNG}")
    print(f"page: {where / drawn.HTML}")
