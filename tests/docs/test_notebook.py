"""The notebook runs, and what is kept of its outputs is what comes out."""

from __future__ import annotations

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "one_round.ipynb"


def outputs(notebook):
    """What each cell prints, and how many pictures it draws."""
    return [
        (
            "".join(o.text for o in cell.outputs if o.output_type == "stream"),
            sum("image/png" in o.get("data", {}) for o in cell.outputs),
        )
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_it_runs_and_prints_what_is_kept():
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("matplotlib")
    kept = nbformat.read(NOTEBOOK, as_version=4)
    kept_outputs = outputs(kept)
    assert [pictures for _, pictures in kept_outputs] == [0, 0, 0, 1, 1]
    nbclient.NotebookClient(kept, timeout=200, kernel_name="python3").execute()
    assert outputs(kept) == kept_outputs


def test_it_is_small():
    assert NOTEBOOK.stat().st_size < 200_000
