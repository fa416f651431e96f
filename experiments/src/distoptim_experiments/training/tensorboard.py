"""The lines of a record as TensorBoard scalars."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from distoptim_experiments.records import Line


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
            "log": ("loss",),
            "evaluation": ("test_loss", "test_accuracy"),
            "summary": ("exposed_share",),
        }
        for name in names.get(line["kind"], ()):
            self._writer.add_scalar(name, line[name], line["step"])
        if line["kind"] == "summary":
            self._writer.close()
