"""The recorded runs of a folder, as a report needs them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from distoptim_experiments import records
from distoptim_experiments.config import POWERSGD, SYNCHRONOUS
from distoptim_experiments.records import Record, Summary
from distoptim_experiments.report.figure import COLOURS
from distoptim_experiments.training.compare import METHODS

TRIALS = "trials"
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A run that has ended.

    Attributes:
        label: the method's name in the report, with what tells it from others of that name.
        record: its lines.
        summary: the last of them.
        tuning: made to choose the learning rate.
        style: number of the method's colour and marker, the same in all reports for the methods of
            the paper.
    """

    label: str
    record: Record
    summary: Summary
    tuning: bool = False
    style: int = 0

    @property
    def method(self) -> str:
        """The method's name as recorded."""
        return self.record.start.label

    @property
    def tau(self) -> int:
        """Local steps in a round."""
        return int(self.record.config.tau)

    @property
    def partition(self) -> str:
        """How the training set was cut."""
        return str(self.record.config.partition)

    @property
    def synchronous(self) -> bool:
        """Has no tau."""
        return bool(self.record.config.algorithm in (SYNCHRONOUS, POWERSGD))

    @property
    def virtual(self) -> bool:
        """Made on virtual workers: its seconds are simulated."""
        return self.record.start.machines is not None

    @property
    def experiment(self) -> str:
        """What only runs that have it in common can be compared."""
        config = self.record.config
        return f"{config.model} on {config.data}, {'virtual' if self.virtual else 'real'} workers"

    @property
    def slowdown(self) -> str:
        """Random slow-downs of the machines, or "none"."""
        machines = self.record.start.machines or self.record.config
        return "trace" if getattr(machines, "trace", None) else str(machines.slowdown)

    @property
    def diverged(self) -> bool:
        """As recorded; where that is missing, a test loss that is not finite."""
        return self.summary.diverged

    def value(self, name: str) -> float | None:
        """A figure of the summary, or of the last evaluation; None if there is none."""
        value = getattr(self.summary, name)
        return None if value is None else float(value)


@dataclass(frozen=True)
class Runs:
    """What is in a folder.

    Attributes:
        ended: the runs with a summary, by experiment, synchronous SGD first.
        notes: one line for every record that is damaged, unfinished or superseded, naming it.
    """

    ended: list[Run]
    notes: list[str]

    @property
    def tuning(self) -> list[Run]:
        """Those that chose the learning rates."""
        return [run for run in self.ended if run.tuning]

    @property
    def final(self) -> list[Run]:
        """All others."""
        return [run for run in self.ended if not run.tuning]

    @property
    def plain(self) -> list[Run]:
        """Those of the final ones that no slow-downs disturbed; all, if there are no others."""
        return [run for run in self.final if run.slowdown == "none"] or self.final


def read(folder: Path) -> Runs:
    """All records below a folder; those in a folder "trials", or of stage "tune", chose learning
    rates.

    Raises:
        ValueError: there is no such folder, or no record that has ended; the line names the folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    found: list[Run] = []
    damaged, unfinished = [], []
    for place in records.folders(folder):
        name = place.relative_to(folder).as_posix()
        if not records.file(place).exists():
            unfinished.append(name)
            continue
        try:
            run = _read(place)
        except ValueError as error:
            damaged.append(f"damaged, left out: {str(error).replace(f'{folder}/', '')}")
            continue
        if run is None:
            unfinished.append(name)
        else:
            found.append(run)
    notes = damaged + (
        [f"{len(unfinished)} unfinished, left out: {', '.join(unfinished)}"] if unfinished else []
    )
    if not found:
        raise ValueError("; ".join([f"{folder}: no finished run there", *notes]))
    kept = _newest(found)
    if len(kept) < len(found):
        notes.append(
            f"{len(found) - len(kept)} superseded by a later run of the same configuration, left out"
        )
    groups = by(sorted(_told_apart(kept), key=_order), lambda run: run.experiment)
    return Runs([run for group in groups.values() for run in _styled(group)], notes)


def by(items: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """Items by their key, in the order in which the keys appear."""
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def partitions(runs: Iterable[Run]) -> list[str]:
    """Their partitions, "iid" first."""
    return sorted({run.partition for run in runs}, key=lambda name: (name != "iid", name))


def taus(runs: Sequence[Run]) -> list[int]:
    """Their periods; synchronous SGD, which has none, counts only alone."""
    return sorted({run.tau for run in runs if not run.synchronous} or {run.tau for run in runs})


def labels(runs: Iterable[Run]) -> dict[str, int]:
    """Their methods, in order, with the numbers of their styles."""
    return {run.label: run.style for run in runs}


def at(runs: Iterable[Run], tau: int) -> list[Run]:
    """Those to be shown at a period: synchronous SGD at every one."""
    return [run for run in runs if run.tau == tau or run.synchronous]


def _read(place: Path) -> Run | None:
    record = records.read(place)
    if record.summary is None:
        return None
    tuning = place.parent.name == TRIALS
    run = Run("", record, record.summary, tuning)
    return replace(run, label=run.method)


def setting(run: Run) -> dict[str, str]:
    """All that a result depends on but the seed, as text.

    A field that an older record lacks had its default.
    """
    config = run.record.config.to_dict()
    config = {name: value for name, value in config.items() if name not in ("seed", "options")}
    machines = run.record.start.machines
    parts = (config, run.record.config.options, machines.to_dict() if machines else {})
    return {
        name: f"{value:g}" if isinstance(value, float) else str(value)
        for part in parts
        for name, value in part.items()
    }


def _newest(runs: Sequence[Run]) -> list[Run]:
    """One run per configuration and seed."""
    kept = {
        (run.label, run.tuning, run.record.config.seed, *sorted(setting(run).items())): run
        for run in sorted(runs, key=lambda run: run.record.start.surroundings.date)
    }
    return list(kept.values())


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """Final runs that differ in more than seed, tau and partition get a name that says in what."""
    out = [run for run in runs if run.tuning]
    final = (run for run in runs if not run.tuning)
    for group in by(
        final, lambda r: (r.experiment, r.label, r.tau, r.partition, r.slowdown)
    ).values():
        settings = [setting(run) for run in group]
        names = [
            name
            for name in dict.fromkeys(n for s in settings for n in s)
            if len({s.get(name) for s in settings}) > 1
        ]
        out += [
            replace(
                run, label=", ".join([run.label, *(f"{n} {s.get(n, 'default')}" for n in names)])
            )
            for run, s in zip(group, settings, strict=True)
        ]
    return out


def _styled(runs: Sequence[Run]) -> list[Run]:
    """The methods of the paper have numbers of their own.

    Others, and variants, get what is left, black at last.
    """
    numbers: dict[str, int] = {}
    final = [(run.label, run.record.config.algorithm) for run in runs if not run.tuning]
    for label, name in final:
        if name in METHODS and METHODS.index(name) not in numbers.values():
            numbers.setdefault(label, METHODS.index(name))
    own = set(numbers.values())
    left = (
        i
        for i in itertools.chain(
            range(len(METHODS), len(COLOURS)),
            reversed(range(len(METHODS))),
            itertools.count(len(COLOURS)),
        )
        if i not in own
    )
    for label, _ in final:
        if label not in numbers:
            numbers[label] = next(left)
    return [replace(run, style=numbers.get(run.label, 0)) for run in runs]


def _order(run: Run) -> tuple[int, str, int, str, int]:
    name = run.record.config.algorithm
    return (
        METHODS.index(name) if name in METHODS else len(METHODS),
        run.label,
        run.tau,
        run.partition,
        run.record.config.seed,
    )
