"""The subcommand that runs a whole grid of experiments."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from distoptim.reproduce import run, spec
from distoptim.train import data, records


@click.command
@click.argument("file", metavar="FILE.toml|small|stragglers|shakespeare|paper|gpu", type=click.Path(path_type=Path))
@click.option("--data-dir", type=click.Path(), metavar="FOLDER", help="Where the files of the data set are.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where records go.  [default: runs/NAME]")
@click.option("--processes", type=int, help="Runs at the same time.  [default: one per core]")
def reproduce(*, file: Path, data_dir: str | None, folder: Path | None, processes: int | None) -> None:
    """Run the grid in a file: choose learning rates on the validation set, then run every combination.

    Interrupted at any moment, it goes on when called again: finished runs are kept, others go on at their last epoch.
    """
    grid = spec.read(file, overrides={"data_dir": data_dir} if data_dir else {})
    data.load(grid.run["data"], Path(data_dir) if data_dir else None)
    folder = folder or Path("runs") / file.stem
    console = Console()
    columns = (TextColumn("{task.description:<14}"), *Progress.get_default_columns()[1:2], MofNCompleteColumn(),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(*columns, console=console, speed_estimate_period=3600) as bar:
        totals = {"learning rates": len(grid.trials()), "runs": len(grid.cases()) * len(grid.machines)}
        tasks = {name: bar.add_task(name, total=total) for name, total in totals.items() if total}
        folders = run.reproduce(grid, folder, processes=processes, done=lambda name, finished, total: bar.update(
            tasks[name], completed=finished, total=total) if name in tasks else None)
    for path in folders:
        record = records.read(path)
        assert record.summary is not None
        if record.summary["diverged"]:
            console.print(f"diverged: {record.start['label']}, tau {record.config['tau']}, "
                          f"{record.config['partition']}, seed {record.config['seed']}", highlight=False)
    console.print(f"records: {folder}; tables and figures: distoptim report {folder}", soft_wrap=True, highlight=False)
