"""The lines of a record as scalars of TensorBoard and of Weights & Biases, under one prefix."""

from __future__ import annotations

from pathlib import Path
from typing import final

from distoptim_experiments.records import Evaluation, Line, Log, Resume, Start, Summary

_NAMES: dict[type[Line], tuple[str, ...]] = {
    Log: ("loss", "exposed_share", "tau"),
    Evaluation: ("test_loss", "test_accuracy", "validation_loss", "validation_accuracy"),
    Summary: ("exposed_share", "overhead_share"),
}


def scalars(line: Line) -> dict[str, float]:
    """What of a line is a number over the steps, as `distoptim/NAME`."""
    values = {name: getattr(line, name) for name in _NAMES.get(type(line), ())}
    return {f"distoptim/{name}": value for name, value in values.items() if value is not None}


@final
class TensorBoard:
    """Called with every line of a record.

    Args:
        folder: for the event files.
    """

    def __init__(self, folder: Path) -> None:
        # An extra, which takes seconds to import.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def __call__(self, line: Line) -> None:
        """Write what is a number over the steps."""
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, line.step)
        if isinstance(line, Summary):
            self._writer.close()


@final
class WeightsAndBiases:
    """Called with every line of a record.

    Where to, and whether online, is said as everywhere: WANDB_PROJECT, WANDB_MODE.

    Args:
        folder: for its files.
    """

    def __init__(self, folder: Path) -> None:
        # No extra: imported by who asks for it alone.
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(dir=str(folder))

    def __call__(self, line: Line) -> None:
        """Log what is a number over the steps."""
        if isinstance(line, Start | Resume):
            self._run.config.update(line.config.to_dict(), allow_val_change=True)
        elif found := scalars(line):
            self._run.log(found, step=line.step)
        if isinstance(line, Summary):
            self._run.finish()
