"""Run a grid: the trials that choose learning rates, then every combination.

Each once, on all cores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, final

from distoptim_experiments import frames
from distoptim_experiments.grid import simulated
from distoptim_experiments.grid.ended import Ended
from distoptim_experiments.grid.spec import Case, Spec
from distoptim_experiments.machines import Machines

TRIALS = frames.TRIALS
FINAL = frames.FINAL
Setting = tuple[str, int, str]
Done = Callable[[float, int], object]
Another = Callable[[], bool]
T = TypeVar("T")


class Runner(ABC):
    """Makes the runs of a grid.

    `done` is told how many are finished (with a share of the one on its way), of all; `another` says
    whether another run may begin.
    """

    @abstractmethod
    def runs(self, cases: Sequence[Case], folder: Path) -> list[tuple[Case, Path]]:
        """Every run that the cases mean, and the folder of its record."""

    @abstractmethod
    def run_all(
        self, cases: Sequence[Case], folder: Path, done: Done, another: Another
    ) -> list[Path]:
        """Run what has not ended yet; returns all records' folders, in order."""

    def decide(self, make: Callable[[], T]) -> T:
        """What `make` returns, made of what JSON has; where there are several processes, one makes
        it for all."""
        return make()


@final
@dataclass(frozen=True)
class VirtualRunner(Runner):
    """Virtual workers: all cases on all machines, one kind of them after the other.

    Args:
        machines: the kinds.
        processes: runs at the same time; default one per core.
    """

    machines: Sequence[Machines]
    processes: int | None = None

    def runs(self, cases: Sequence[Case], folder: Path) -> list[tuple[Case, Path]]:
        """Each case on each kind of machines."""
        return [
            (case, folder / simulated.name(case.config, kind))
            for kind in self.machines
            for case in cases
        ]

    def run_all(
        self, cases: Sequence[Case], folder: Path, done: Done, another: Another
    ) -> list[Path]:
        """Run what has not ended yet; returns all records' folders, in order."""
        total = len(cases) * len(self.machines)
        for i, kind in enumerate(self.machines):
            before = i * len(cases)

            def told(finished: int, _: int, before: int = before) -> None:
                done(before + finished, total)

            simulated.run_all(
                [case.config for case in cases],
                kind,
                folder,
                processes=self.processes,
                done=told,
                labels=[case.label for case in cases],
                ended=Ended(folder.parent),
                another=another,
            )
        return [path for _, path in self.runs(cases, folder)]


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

    def runs(self) -> list[tuple[Case, Path]]:
        """See `Runner.runs`."""
        return self.runner.runs(self.cases, self.folder)


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
        runner or VirtualRunner(spec.machines[:1], processes),
        folder / TRIALS,
    )
    if trials.cases:
        yield trials

    def rates() -> list[tuple[Setting, float]]:
        ended = Ended(folder)
        tried = trials.runs()
        missing = {case.setting for case, path in tried if path not in ended}
        whole = [(case, path) for case, path in tried if case.setting not in missing]
        return list(choose(whole, ended).items())

    chosen = {
        (label, tau, partition): lr for (label, tau, partition), lr in trials.runner.decide(rates)
    }
    yield Stage(
        "runs",
        spec.cases(chosen),
        runner or VirtualRunner(spec.machines, processes),
        folder / FINAL,
    )


def reproduce(
    spec: Spec,
    folder: Path,
    *,
    processes: int | None = None,
    runner: Runner | None = None,
    done: Callable[[str, float, int], object] = lambda stage, finished, total: None,
    another: Another = lambda: True,
) -> list[Path]:
    """Run what has not ended yet, one method after the other; returns the folders of the final runs.

    After each method all runs are written into the CSV files of the folder, so that what an interrupted
    grid has is whole methods.

    Args:
        spec, folder, processes, runner: see `stages`.
        done: told (stage, finished, total) at the start of a stage and as runs go on.
        another: whether another run may begin; once it may not, those on their way are finished.
    """
    totals = {stage.name: len(stage.runs()) for stage in stages(spec, folder, runner=runner)}
    before = dict.fromkeys(totals, 0)
    for method in spec.by_method():
        if not (runner or VirtualRunner(())).decide(another):
            break
        for stage in stages(method, folder, processes=processes, runner=runner):

            def told(finished: float, _: int, name: str = stage.name) -> None:
                done(name, before[name] + finished, totals[name])

            stage.runner.run_all(stage.cases, stage.folder, told, another)
            before[stage.name] += len(stage.runs())
        stage.runner.decide(lambda: [path.name for path in frames.write(folder)])
    *_, final = stages(spec, folder, runner=runner)
    return [path for _, path in final.runs()]


def choose(trials: Sequence[tuple[Case, Path]], ended: Ended) -> dict[Setting, float]:
    """For each method, tau and partition the learning rate of the best score on the validation set.

    The score is accuracy, of text the loss. Of equal ones the smaller rate; a diverged trial counts
    as the worst.

    Args:
        trials: with their folders.
        ended: how they ended.
    """
    best: dict[Setting, tuple[float, float]] = {}
    for case, folder in trials:
        score = (ended.score(folder), -case.config.lr)
        best[case.setting] = max(best.get(case.setting, score), score)
    return {setting: -lr for setting, (_, lr) in best.items()}
