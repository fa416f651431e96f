"""Which runs of a grid have ended, and how: by their records, or by rows of the grid's `runs.csv`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from distoptim_experiments import frames, records
from distoptim_experiments.models.registry import TEXT_MODELS


@final
class Ended:
    """The runs of one grid that have ended; the rows are those that were there when this was made.

    Args:
        folder: of the grid, in which the runs' folders lie as `runs.csv` names them.

    Raises:
        ValueError: the file is damaged; the line names it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: Mapping[str, Mapping[str, Any]] = frames.rows(folder)

    def __contains__(self, run: Path) -> bool:
        """Whether the run of this folder has ended, diverged or not."""
        return records.finished(run) or self._name(run) in self._rows

    def score(self, run: Path) -> float:
        """Accuracy on the validation set, of text the negative loss; -inf if it diverged."""
        record = records.read(run) if records.finished(run) else None
        if record is None or record.summary is None:
            row = self._rows[self._name(run)]
            return _score(row, str(row["model"]))
        return _score(record.summary.model_dump(), record.config.model)

    def _name(self, run: Path) -> str:
        return run.relative_to(self._folder).as_posix()


def _score(found: Mapping[str, Any], model: str) -> float:
    """The higher the better."""
    of_text = model in TEXT_MODELS
    value = found.get("validation_loss" if of_text else "validation_accuracy")
    if found["diverged"] or value is None or math.isnan(value):
        return -math.inf
    return -float(value) if of_text else float(value)
