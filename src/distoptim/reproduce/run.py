"""Run a grid: the trials that choose learning rates, then every combination; each once, on all cores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from distoptim.reproduce.spec import Case, Spec
from distoptim.sim import grid
from distoptim.sim.machines import Machines
from distoptim.train import records
from distoptim.train.models import TEXT_MODELS

TRIALS, FINAL = "trials", "final"
Setting = tuple[str, int, str]


def reproduce(spec: Spec, folder: Path, *, processes: int | None = None,
              done: Callable[[str, int, int], object] = lambda stage, finished, total: None) -> list[Path]:
    """Run what has no whole record yet; returns the folders of the final runs.

    Args:
        spec: the grid.
        folder: of its records.
        processes: runs at the same time; default one per core.
        done: told (stage, finished, total) at the start of a stage and after every run.
    """
    trials = spec.trials()
    tried = _run(trials, spec.machines[:1], folder / TRIALS, processes, lambda *at: done("learning rates", *at))
    rates = choose(trials, tried)
    return _run(spec.cases(rates), spec.machines, folder / FINAL, processes, lambda *at: done("runs", *at))


def choose(trials: Sequence[Case], folders: Sequence[Path]) -> dict[Setting, float]:
    """For each method, tau and partition the learning rate of the best score on the validation set.

    The score is accuracy, of text the loss. Of equal ones the smaller rate; a diverged trial counts as the worst.
    """
    best: dict[Setting, tuple[float, float]] = {}
    for case, folder in zip(trials, folders, strict=True):
        score = (_validation(folder), -case.config.lr)
        best[case.setting] = max(best.get(case.setting, (-math.inf, 0.0)), score)
    return {setting: -lr for setting, (_, lr) in best.items()}


def _validation(folder: Path) -> float:
    """The higher the better."""
    record = records.read(folder)
    if record.summary is None or record.summary["diverged"]:
        return -math.inf
    if record.config["model"] in TEXT_MODELS:
        return -float(record.summary["validation_loss"])
    return float(record.summary["validation_accuracy"])


def _run(cases: Sequence[Case], machines: Sequence[Machines], folder: Path, processes: int | None,
         done: Callable[[int, int], object]) -> list[Path]:
    """All cases on all machines, one kind of them after the other."""
    folders: list[Path] = []
    for kind in machines:
        before, total = len(folders), len(cases) * len(machines)

        def told(finished: int, _: int, before: int = before, total: int = total) -> None:
            done(before + finished, total)

        folders += grid.run_all([case.config for case in cases], kind, folder, processes=processes, done=told,
                                labels=[case.label for case in cases])
    return folders
