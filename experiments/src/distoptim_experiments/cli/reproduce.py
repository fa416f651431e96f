"""The subcommand that runs a whole grid of experiments."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from importlib import resources
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.progress import (
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from distoptim import checks
from distoptim.cli import Flag, Whole
from distoptim_experiments import frames
from distoptim_experiments.cli.options import check_files, worker_errors
from distoptim_experiments.config import RunConfig
from distoptim_experiments.grid import estimate, run, spec
from distoptim_experiments.grid.ended import Ended
from distoptim_experiments.grid.real import LocalProcesses, OneOfWorkers
from distoptim_experiments.training.rendezvous import Rendezvous, from_torchrun
from distoptim_experiments.training.signals import Stopped

_SHIPPED = ", ".join(
    sorted(
        Path(file.name).stem
        for file in resources.files("distoptim_experiments.grids").iterdir()
        if file.name.endswith(".toml")
    )
)


@worker_errors()
def reproduce(
    file: Annotated[
        Path, Parameter(name="GRID", help=f"A TOML file, or one that is shipped: {_SHIPPED}.")
    ],
    /,
    *,
    data_dir: Annotated[str | None, Parameter(metavar="FOLDER")] = None,
    folder: Annotated[Path | None, Parameter(metavar="FOLDER")] = None,
    processes: Whole | None = None,
    real: Flag = False,
    assignments: Annotated[
        tuple[str, ...],
        Parameter(name="--set", metavar="KEY=VALUE", negative=(), show_default=False),
    ] = (),
    hours: float | None = None,
    dry_run: Flag = False,
) -> int:
    """Run the grid in a file: choose learning rates on the validation set, then run every
    combination.

    Interrupted at any moment, it goes on when called again: finished runs are kept, as records or as
    rows of the folder's runs.csv, others go on at their last epoch.

    Args:
        file: The grid.
        data_dir: Where the files of the data set are.
        folder: Where records go. [default: runs/NAME]
        processes: Runs on virtual workers at the same time. [default: one per core]
        real: Real workers, one run after the other; always so under torchrun.
        assignments: Instead of what the file says in [grid] or else [run], or in TABLE.KEY; may be
            given again.
        hours: Begin no run after so many; the same command goes on. [default: no limit]
        dry_run: Show all runs, and how long those that are left would take; make none.
    """
    given = dict(spec.assignment(text) for text in assignments)
    rendezvous = from_torchrun()
    if processes and (real or rendezvous):
        raise ValueError(f"--processes {processes}: has an effect only on virtual workers")
    grid = spec.read(
        file,
        overrides={**given, **({"run.data_dir": data_dir} if data_dir else {})},
        virtual=rendezvous is None and not real,
    )
    configs = [case.config for case in (*grid.trials(), *grid.cases())]
    for config in {repr((config.data, config.data_dir)): config for config in configs}.values():
        check_files(config)
    folder = folder or Path("runs") / file.stem
    console = Console(quiet=rendezvous is not None and rendezvous.rank > 0)
    runner = (
        _runner(file, configs, rendezvous) if rendezvous else LocalProcesses() if real else None
    )
    stages = list(run.stages(grid, folder, runner=runner))
    left = _left(stages, folder)
    if dry_run:
        _show(stages, left, console)
    _tell_estimate(left, None if runner else processes or os.cpu_count() or 1, console)
    if dry_run:
        return 0
    another = _until(hours)
    try:
        folders = _run(grid, folder, processes, runner, console, another)
    except Stopped as stopped:
        if not console.quiet:
            print("Stopped; the same command goes on", file=sys.stderr)
        return 128 + stopped.signum
    to_do = len(_left(list(run.stages(grid, folder, runner=runner)), folder))
    if to_do:
        console.print(f"{hours:g} hours are over, {to_do} to do: the same command goes on")
    if not console.quiet:
        _tell_diverged(folders, folder, console)
    console.print(
        f"records: {folder}; tables and figures: distoptim report {folder}",
        soft_wrap=True,
        highlight=False,
    )
    return 0


def _until(hours: float | None) -> run.Another:
    """Whether so many hours from now are not over yet."""
    if hours is None:
        return lambda: True
    end = time.monotonic() + 3600 * checks.number("hours", hours, 0, math.inf, open_high=True)
    return lambda: time.monotonic() < end


def _tell_diverged(folders: Sequence[Path], folder: Path, console: Console) -> None:
    rows = frames.rows(folder)
    for name in (path.relative_to(folder).as_posix() for path in folders):
        row = rows.get(name)
        if row is not None and row["diverged"]:
            console.print(
                "diverged: {label}, tau {tau}, {partition}, seed {seed}".format_map(row),
                highlight=False,
            )


def _runner(file: Path, configs: Sequence[RunConfig], rendezvous: Rendezvous) -> OneOfWorkers:
    for config in configs:
        if config.ranks != rendezvous.size:
            of = f" of {config.island_size} ranks" if config.island_size > 1 else ""
            raise ValueError(
                f"{file}: workers={config.workers}{of}, but torchrun has started {rendezvous.size} processes"
            )
    return OneOfWorkers(rendezvous, max(config.timeout_s for config in configs))


def _run(
    grid: spec.Spec,
    folder: Path,
    processes: int | None,
    runner: run.Runner | None,
    console: Console,
    another: run.Another,
) -> list[Path]:
    """With a bar for each stage."""
    columns = (
        TextColumn("{task.description:<14}"),
        *Progress.get_default_columns()[1:2],
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, speed_estimate_period=3600) as bar:
        totals = {
            stage.name: len(stage.runs()) for stage in run.stages(grid, folder, runner=runner)
        }
        tasks = {name: bar.add_task(name, total=total) for name, total in totals.items()}
        return run.reproduce(
            grid,
            folder,
            processes=processes,
            runner=runner,
            another=another,
            done=lambda name, finished, total: bar.update(tasks[name], completed=finished),
        )


def _left(stages: Sequence[run.Stage], folder: Path) -> list[tuple[RunConfig, Path]]:
    """The runs that have not ended, and their folders."""
    ended = Ended(folder)
    return [
        (case.config, path) for stage in stages for case, path in stage.runs() if path not in ended
    ]


def _show(
    stages: Sequence[run.Stage], left: Sequence[tuple[RunConfig, Path]], console: Console
) -> None:
    """A line for each run."""
    open_ = {path for _, path in left}
    for stage in stages:
        for case, path in stage.runs():
            config = case.config
            console.print(
                f"{'to do' if path in open_ else 'done'}  {stage.name}: {case.label}, tau {config.tau}, "
                f"{config.partition}, seed {config.seed}, lr {config.lr:g}",
                highlight=False,
                soft_wrap=True,
            )


def _tell_estimate(
    left: Sequence[tuple[RunConfig, Path]], processes: int | None, console: Console
) -> None:
    """How many runs are left, and how long they take; processes: for virtual workers."""
    if console.quiet:
        return
    virtual = processes is not None
    took = estimate.seconds([config for config, _ in left], virtual=virtual) / (processes or 1)
    console.print(
        f"{len(left)} to do, about {timedelta(seconds=round(took))} for their training steps, "
        f"{f'{processes} runs at a time' if virtual else 'with a core for each worker'}",
        highlight=False,
    )
