"""A table of runs, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from distoptim.train.records import Record


def table(runs: Sequence[Record]) -> Table:
    """One row per finished run."""
    out = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2))
    out.add_column("method")
    for heading in ("test\naccuracy", "test\nloss", "training\nseconds", "exposed,\n% of comp.", "MB sent\nper worker",
                    "syncs"):
        out.add_column(heading, justify="right", vertical="bottom")
    for run in runs:
        s = run.summary
        assert s is not None
        out.add_row(run.config["algorithm"], f"{s['test_accuracy']:.2%}", f"{s['test_loss']:.3f}",
                    f"{s['seconds']:.1f}", f"{s['exposed_share']:.1%}", f"{s['bytes'] / 1e6:.1f}", str(s["syncs"]))
    return out
