"""Real workers for a grid: processes started here, or those that torchrun has started.

One run after the other.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import final

from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # public, but not marked so

from distoptim_experiments import records
from distoptim_experiments.grid import simulated
from distoptim_experiments.grid.ended import Ended
from distoptim_experiments.grid.run import Another, Done, Runner, T
from distoptim_experiments.grid.spec import Case
from distoptim_experiments.training import checkpoint
from distoptim_experiments.training.launch import Job, run_local, run_worker
from distoptim_experiments.training.loop import Observer
from distoptim_experiments.training.rendezvous import Rendezvous
from distoptim_experiments.training.signals import Stopped, interruptible


def _share(finished: int, total: int, done: Done) -> Observer:
    """Tells how far the run on its way is."""
    steps = 1

    def observe(line: records.Line) -> None:
        nonlocal steps
        if isinstance(line, records.Start | records.Resume):
            steps = line.steps
        done(finished + min(0.99, line.step / steps), total)

    return observe


def _left(runs: Sequence[tuple[Case, Path]], ended: Ended) -> list[tuple[int, bool]]:
    """Which have not ended, and whether there is a checkpoint of them."""
    return [(i, checkpoint.exists(path)) for i, (_, path) in enumerate(runs) if path not in ended]


class RealRunner(Runner, ABC):
    """Real workers; subclasses say whose processes they are."""

    def runs(self, cases: Sequence[Case], folder: Path) -> list[tuple[Case, Path]]:
        """A folder for each case; not that of the same case on virtual workers."""
        return [(case, folder / simulated.name(case.config, None)) for case in cases]

    def run_all(
        self, cases: Sequence[Case], folder: Path, done: Done, another: Another
    ) -> list[Path]:
        """Run what has not ended yet, going on from checkpoints.

        Returns all records' folders, in order.

        Raises:
            Stopped: a signal did; the run that was on its way has left a checkpoint.
        """
        runs = self.runs(cases, folder)
        left = self.decide(lambda: _left(runs, Ended(folder.parent)))
        done(finished := len(cases) - len(left), len(cases))
        for i, resume in left:
            if not self.decide(another):
                break
            case, path = runs[i]
            signum = self.run(
                Job(case.config, path, resume, label=case.label, keep_checkpoint=False),
                [_share(finished, len(cases), done)],
            )
            if signum:
                raise Stopped(signum)
            done(finished := finished + 1, len(cases))
        return [path for _, path in runs]

    @abstractmethod
    def run(self, job: Job, observers: Sequence[Observer]) -> int:
        """One run, from start or checkpoint to end; returns the signal that stopped it, or 0."""


@final
class LocalProcesses(RealRunner):
    """Starts each run's workers on this machine, and ends them."""

    def run(self, job: Job, observers: Sequence[Observer]) -> int:
        """All of its workers."""
        return run_local(job, observers)


@final
class OneOfWorkers(RealRunner):
    """Is one worker of every run, in a process that somebody else has started; rank 0 decides what
    is run.

    Args:
        rendezvous: where the workers find each other.
        timeout_s: bound of every wait for rank 0's decisions.
    """

    def __init__(self, rendezvous: Rendezvous, timeout_s: float) -> None:
        self.rendezvous = rendezvous
        self._store = rendezvous.connect(timeout_s)
        self._decisions = 0
        self._runs = 0

    def decide(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on all workers."""
        self._decisions += 1
        key = f"decision{self._decisions}"
        if self.rendezvous.rank == 0:
            # No pickle: whoever reaches the store could put one there that runs code on all workers.
            self._store.set(key, json.dumps(make()))
        made: T = json.loads(interruptible(lambda: self._store.get(key)))
        return made

    def run(self, job: Job, observers: Sequence[Observer]) -> int:
        """One rank's part of a run, in step with the others."""
        self._runs += 1
        # A group must not find the addresses of the one before.
        return run_worker(
            job, self.rendezvous, observers, store=PrefixStore(f"run{self._runs}", self._store)
        )
