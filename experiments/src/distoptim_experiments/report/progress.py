"""Live progress of runs in the terminal, fed by the lines of their records."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from distoptim_experiments.records import Evaluation, Line, Log, Membership, Resume, Start
from distoptim_experiments.training.loop import Observer


class LiveProgress(Progress):
    """One bar per run, with the last loss and test accuracy, what of its communication is exposed so
    far (in % of the computation), tau, and the time that is left.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:>6}"),
            TextColumn("test {task.fields[accuracy]:>5}"),
            TextColumn("exposed {task.fields[exposed]:>5}"),
            TextColumn("tau {task.fields[tau]:>3}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )

    def watch(self, name: str) -> Observer:
        """What is to be given the lines of a run called `name`."""
        task = self.add_task(name, total=None, loss="", accuracy="", exposed="", tau="")

        def observe(line: Line) -> None:
            if isinstance(line, Start | Resume):
                self.update(task, total=line.steps, completed=line.step)
            elif isinstance(line, Log):
                share = line.exposed_share
                self.update(
                    task,
                    completed=line.step,
                    loss=f"{line.loss:.4f}",
                    exposed="" if share is None else f"{share:.1%}",
                    tau="" if line.tau is None else f"{line.tau:g}",
                )
            elif isinstance(line, Evaluation):
                self.update(task, completed=line.step, accuracy=f"{line.test_accuracy:.1%}")
            elif isinstance(line, Membership):
                said = f"local step {line.step}: {line.worker} {line.what} ({line.why}); now {line.members}"
                self.console.print(said, soft_wrap=True, highlight=False, markup=False)

        return observe
