"""What the planner knows of the studies is what their records say."""

from __future__ import annotations

from pathlib import Path

from distoptim_experiments.studies import planned

from distoptim.planning import studied

ROOT = Path(__file__).parents[3]


def test_the_table_is_that_of_the_records():
    rows = planned.table(ROOT / "results")
    assert list(studied.STUDIED) == rows
    path = Path(studied.__file__)
    assert planned.source(rows, path.read_text()) == path.read_text()
