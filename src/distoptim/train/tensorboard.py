"""The lines of a record as TensorBoard scalars."""

from __future__ import annotations

from pathlib import Path

from distoptim.train.records import Line


def tensorboard_observer(folder: Path) -> "Writer":
    """Logs into the folder `tensorboard` of a run's folder.

    Raises:
        ValueError: TensorBoard is not installed.
    """
    return Writer(folder / "tensorboard")


class Writer:
    """Called with every line of a record.

    Args:
        folder: for the event files.

    Raises:
        ValueError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("--tensorboard needs TensorBoard: pip install 'distoptim[tensorboard]'") from error
        self._writer = SummaryWriter(str(folder))  # type: ignore[no-untyped-call]

    def __call__(self, line: Line) -> None:
        """Write what is a number over the steps."""
        names = {"log": ("loss",), "evaluation": ("test_loss", "test_accuracy"), "summary": ("exposed_share",)}
        for name in names.get(line["kind"], ()):
            self._writer.add_scalar(name, line[name], line["step"])  # type: ignore[no-untyped-call]
        if line["kind"] == "summary":
            self._writer.close()  # type: ignore[no-untyped-call]
