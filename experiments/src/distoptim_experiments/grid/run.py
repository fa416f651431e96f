"""Run a grid: the trials that choose learning rates, then every combination.

Each once, on all cores.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from distoptim_experiments import frames, records
from distoptim_experiments.grid import simulated as grid
from distoptim_experiments.grid.spec import Case, Spec
from distoptim_experiments.machines import Machines
from distoptim_experiments.models.registry import TEXT_MODELS

TRIALS = frames.TRIALS
FINAL = frames.FINAL
Setting = tuple[str, int, str]
Done = Callable[[float, int], object]
T = TypeVar("T")


class Runner(ABC):
    """Makes the runs of a grid.

    `done` is told how many are finished (with a share of the one on its way), of all.
    """

    @abstractmethod
    def places(self, cases: Sequence[Case], folder: Path) -> list[tuple[Case, Path]]:
        """Every run that the cases mean, and the folder of its record."""

    @abstractmethod
    def run_all(self, cases: Sequence[Case], folder: Path, done: Done) -> list[Path]:
        """Run what has no whole record yet; returns all records' folders, in order."""

    def decide(self, make: Callable[[], T]) -> T:
        """What `make` returns, made of what JSON has; where there are several processes, one makes
        it for all."""
        return make()


@dataclass(frozen=True)
class Virtual(Runner):
    """Virtual workers: all cases on all machines, one kind of them after the other.

    Args:
        machines: the kinds.
        processes: runs at the same time; default one per core.
    """

    machines: Sequence[Machines]
    processes: int | None = None

    def places(self, cases: Sequence[Case], folder: Path) -> list[tuple[Case, Path]]:
        """Each case on each kind of machines."""
        return [
            (case, folder / grid.name(case.config, kind))
            for kind in self.machines
            for case in cases
        ]

    def run_all(self, cases: Sequence[Case], folder: Path, done: Done) -> list[Path]:
        """Run what has no whole record yet; returns all records' folders, in order."""
        total = len(cases) * len(self.machines)
        for i, kind in enumerate(self.machines):
            before = i * len(cases)

            def told(finished: int, _: int, before: int = before) -> None:
                done(before + finished, total)

            grid.run_all(
                [case.config for case in cases],
                kind,
                folder,
                processes=self.processes,
                done=told,
                labels=[case.label for case in cases],
            )
        return [path for _, path in self.places(cases, folder)]


@dataclass(frozen=True)
class Stage:
    """One of the two parts of a grid.

    Args:
        name: "learning rates" or "runs".
        cases: what is run.
        runner: by whom.
        folder: of the records.
    """

    name: str
    cases: Sequence[Case]
    runner: Runner
    folder: Path

    def places(self) -> list[tuple[Case, Path]]:
        """See `Runner.places`."""
        return self.runner.places(self.cases, self.folder)


def stages(
    spec: Spec, folder: Path, *, processes: int | None = None, runner: Runner | None = None
) -> Iterator[Stage]:
    """The trials that choose learning rates, if there are any; then the runs, with the rates chosen
    so far.

    Args:
        spec: the grid.
        folder: of its records.
        processes: runs on virtual workers at the same time; default one per core.
        runner: real workers; default virtual ones.
    """
    trials = Stage(
        "learning rates",
        spec.trials(),
        runner or Virtual(spec.machines[:1], processes),
        folder / TRIALS,
    )
    if trials.cases:
        yield trials

    def rates() -> list[tuple[Setting, float]]:
        tried = trials.places()
        missing = {case.setting for case, path in tried if not records.finished(path)}
        chosen = choose([(case, path) for case, path in tried if case.setting not in missing])
        return list(chosen.items())

    chosen = {
        (label, tau, partition): lr for (label, tau, partition), lr in trials.runner.decide(rates)
    }
    yield Stage(
        "runs", spec.cases(chosen), runner or Virtual(spec.machines, processes), folder / FINAL
    )


def reproduce(
    spec: Spec,
    folder: Path,
    *,
    processes: int | None = None,
    runner: Runner | None = None,
    done: Callable[[str, float, int], object] = lambda stage, finished, total: None,
) -> list[Path]:
    """Run what has no whole record yet, and write all runs into the CSV files of the folder; returns
    the folders of the final runs.

    Args:
        spec, folder, processes, runner: see `stages`.
        done: told (stage, finished, total) at the start of a stage and as runs go on.
    """
    folders: list[Path] = []
    for stage in stages(spec, folder, processes=processes, runner=runner):
        folders = stage.runner.run_all(stage.cases, stage.folder, partial(done, stage.name))
    stage.runner.decide(lambda: [path.name for path in frames.write(folder)])
    return folders


def choose(trials: Sequence[tuple[Case, Path]]) -> dict[Setting, float]:
    """For each method, tau and partition the learning rate of the best score on the validation set.

    The score is accuracy, of text the loss. Of equal ones the smaller rate; a diverged trial counts
    as the worst.

    Args:
        trials: with their folders.
    """
    best: dict[Setting, tuple[float, float]] = {}
    for case, folder in trials:
        score = (_validation(folder), -case.config.lr)
        best[case.setting] = max(best.get(case.setting, (-math.inf, 0.0)), score)
    return {setting: -lr for setting, (_, lr) in best.items()}


def _validation(folder: Path) -> float:
    """The higher the better."""
    record = records.read(folder)
    if record.summary is None or record.summary.diverged:
        return -math.inf
    if record.config.model in TEXT_MODELS:
        return -_known(record.summary.validation_loss)
    return _known(record.summary.validation_accuracy)


def _known(score: float | None) -> float:
    """Of a trial, which always has a validation set."""
    return -math.inf if score is None else score
