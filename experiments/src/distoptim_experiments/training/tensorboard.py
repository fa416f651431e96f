"""The lines of a record as TensorBoard scalars."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from distoptim_experiments.records import Evaluation, Line, Log, Summary


class TensorBoard:
    """Called with every line of a record.

    Args:
        folder: for the event files.
    """

    def __init__(self, folder: Path) -> None:
        self._writer = SummaryWriter(str(folder))

    def __call__(self, line: Line) -> None:
        """Write what is a number over the steps."""
        names = {
            Log: ("loss",),
            Evaluation: ("test_loss", "test_accuracy"),
            Summary: ("exposed_share",),
        }
        for name in names.get(type(line), ()):
            self._writer.add_scalar(name, getattr(line, name), line.step)
        if isinstance(line, Summary):
            self._writer.close()
