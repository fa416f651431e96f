"""A table of runs, for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from distoptim_experiments.records import Record


def table(runs: Sequence[Record]) -> Table:
    """One row per finished run.

    With tau where the runs differ in it, and with the seed likewise.
    """
    told = [key for key in ("tau", "seed") if len({r.config.get(key) for r in runs}) > 1]
    out = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    out.add_column("method", no_wrap=True, vertical="bottom")
    for heading in (
        *told,
        "test\naccuracy",
        "test\nloss",
        "training\nseconds",
        "exposed, %\nof comput.",
        "MB sent\nper worker",
        "syncs",
    ):
        out.add_column(heading, justify="right", vertical="bottom")
    for run in runs:
        s = run.summary
        assert s is not None
        out.add_row(
            run.config["algorithm"],
            *(str(run.config.get(key)) for key in told),
            f"{s.get('test_accuracy', math.nan):.2%}",
            f"{s.get('test_loss', math.nan):.3f}",
            f"{s['seconds']:.1f}",
            f"{s['exposed_share']:.1%}",
            f"{s['bytes'] / 1e6:.1f}",
            str(s["syncs"]),
        )
    return out


def note(runs: Sequence[Record]) -> str:
    """What must be known to compare the methods fairly."""
    lr = runs[0].config["lr"]
    effective = {
        "overlap-local-sgd": "0.69 times that in Overlap-Local-SGD (its pull)",
        "bmuf": f"{runs[0].config['workers']} times in BMUF (its block momentum)",
    }
    said = " and ".join(
        effective[r.config["algorithm"]]
        for r in reversed(runs)
        if r.config["algorithm"] in effective
    )
    return f"All learning rates are {lr:g}, " + (
        f"but the effective one is {said}." if said else "as given."
    )
