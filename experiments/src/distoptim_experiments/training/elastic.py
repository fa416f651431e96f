"""A real worker of a run whose workers come and go."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, final

import torch
from pydantic import Field

from distoptim.comm import Elastic
from distoptim_experiments import records
from distoptim_experiments.config import NETWORK, RunConfig
from distoptim_experiments.settings import Needs, Option, Settings
from distoptim_experiments.training import shards, slowdown
from distoptim_experiments.training.evaluation import goes_on, score, worker_accuracy
from distoptim_experiments.training.loop import Observer, Run
from distoptim_experiments.training.methods.averaging import Averaging
from distoptim_experiments.training.methods.base import Costs
from distoptim_experiments.training.problem import Problem
from distoptim_experiments.training.signals import Stopped, StopSignals, interruptible
from distoptim_experiments.training.workers import Workers
from distoptim_experiments.training.world import Seat

_WITH_ELASTIC = Needs("with --elastic", lambda v: v["elastic"])
_FIXED = {
    "island_size": 1,
    "levels": "",
    "equal_time": 0.0,
    "latency_ms": None,
    "bandwidth_gbit_s": None,
    "hide_communication": False,
}
"""What there is where the number of processes is fixed alone."""


class ElasticOptions(Settings):
    """Which worker this is of those that come and go, and where it meets the others."""

    elastic: Annotated[
        str | None,
        Field(description="Be a worker that comes and goes; `distoptim lighthouse` listens there."),
        Option(NETWORK, metavar="HOST:PORT"),
    ] = None
    name: Annotated[
        str | None,
        Field(description="Of this worker: no two have the same, and one that is back keeps it."),
        Option(NETWORK, needs=_WITH_ELASTIC),
    ] = None
    start: Annotated[
        int | None,
        Field(ge=1, description="So many workers begin a run; who comes later joins it."),
        Option(NETWORK, needs=_WITH_ELASTIC),
    ] = None
    min_workers: Annotated[
        int,
        Field(ge=1, description="With fewer, those that are left wait."),
        Option(NETWORK, needs=_WITH_ELASTIC),
    ] = 1
    host: Annotated[
        str,
        Field(description="Address of this machine at which the other workers reach it."),
        Option(NETWORK, needs=_WITH_ELASTIC),
    ] = "127.0.0.1"


def check(config: RunConfig, options: ElasticOptions) -> None:
    """Whether workers that come and go can make a run.

    Raises:
        ValueError: something of it is of processes whose number is fixed.
    """
    if options.name is None or options.start is None:
        raise ValueError("--elastic HOST:PORT goes with --name NAME and --start N")
    if not options.name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(
            f"--name {options.name}: allowed are letters, digits, - and _; a folder gets this name"
        )
    if config.synchronous:
        raise ValueError(f"{config.algorithm} with --elastic: allowed is a method with rounds")
    for name, value in _FIXED.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name}={getattr(config, name)!r} with --elastic, where no number of processes is "
                f"fixed: allowed is {value!r}"
            )


@final
class ElasticWorker(Workers):
    """One worker, with whoever else is there.

    Members deal the training set out anew whenever they change: of m workers the one whose name is i-th has
    part i of m, shuffled by the local step at which it got it.

    Args:
        problem: what is learned; its workers are those that begin the run.
        options: which worker this is.
        signals: what tells this process to stop.

    Attributes:
        members: the communicator.
    """

    def __init__(self, problem: Problem, options: ElasticOptions, signals: StopSignals) -> None:
        assert options.elastic is not None
        assert options.name is not None
        self.problem = problem
        self.seat = Seat()
        self.members = Elastic(
            options.elastic,
            name=options.name,
            start=options.start or 1,
            min_workers=options.min_workers,
            host=options.host,
            timeout_s=problem.config.timeout_s,
        )
        self._signals = signals
        self._model = problem.model()
        self._method = Averaging(self._model, problem.config, communicator=self.members)
        self._seconds = 0.0
        self._before = Costs()
        # Of the events, so many are in the record.
        self._told = 0
        self._deal()

    def _deal(self) -> None:
        """Take this worker's part of the training set among those that are members now."""
        self._dealt = self.members.generation
        members = list(self.members.members)
        self._index = members.index(self.members.name)
        self._batches = self.problem.batches(
            self._index, of=len(members), turn=self._method.optimizer.local_step
        )

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """Its own."""
        return [self._method.optimizer]

    @property
    def parameters(self) -> int:
        """Of the model."""
        return sum(p.numel() for p in self._model.parameters())

    def begin(self) -> None:
        """Nobody else need be ready."""
        self._model.train()

    def step(self, step: int) -> Sequence[float]:
        """On the next batch of what it has been dealt."""
        begin = time.perf_counter()
        if self.members.generation != self._dealt:
            self._deal()
        slowdown.wait(self.problem.config, worker=self._index, step=step)
        loss = self._method.step(*next(self._batches))
        self._seconds += time.perf_counter() - begin
        return [loss]

    def reached(self, step: int) -> int:
        """The others' local step, where it has just caught up."""
        return self._method.optimizer.local_step

    def resumed(self, step: int) -> int:
        """That of the run, where it is further than the file."""
        return self._method.optimizer.local_step

    def seconds(self) -> float:
        """By its own clock."""
        return self._seconds

    def evaluate(self) -> dict[str, float]:
        """Of what all share, without asking anybody."""
        own = worker_accuracy(self._model, self.problem.data)
        with self._method.averaged():
            return {**score(self._model, self.problem.data), "worker_accuracy": own}

    def verdict(self, losses: Sequence[float]) -> int:
        """Each stops by itself; the others go on."""
        if not goes_on(losses) and not all(
            bool(p.isfinite().all()) for p in self._model.parameters()
        ):
            raise FloatingPointError("this worker's parameters are not finite")
        return self._signals.received

    def so_far(self) -> dict[str, float | None]:
        """By its own clock."""
        return self._method.so_far(self._costs(), self._seconds)

    def totals(self) -> dict[str, Any]:
        """Its own."""
        return {
            "seconds": self._seconds,
            **asdict(self._costs()),
            **self._method.stats(),
        }

    def _costs(self) -> Costs:
        """Since the start of the run, over all processes that were this worker."""
        return self._before + self._method.costs()

    def events(self) -> list[records.Line]:
        """What has happened to the members since this was asked last."""
        step = self._method.optimizer.local_step
        new = self.members.events[self._told :]
        self._told += len(new)
        return [
            records.Membership(
                step=step,
                time=event.time,
                what=event.what,
                worker=event.worker,
                why=event.why,
                members=list(self.members.members),
            )
            for event in new
        ]

    def barrier(self) -> None:
        """Nobody is waited for."""

    def state_dict(self) -> dict[str, Any]:
        """All but its place in what it was dealt."""
        return {
            **shards.state_dict(self._model, self._method.optimizer, self.problem.config),
            "rng": torch.get_rng_state(),
            "seconds": self._seconds,
            "costs": asdict(self._costs()),
        }

    def load_state_dict(self, state_dict: dict[str, Any], *, own: bool) -> None:
        """As far as its file is; or as the run is, where that is further."""
        self._told = len(state_dict["optimizer"]["distoptim"]["elastic"]["events"])
        shards.load_state_dict(self._model, self._method.optimizer, self.problem.config, state_dict)
        torch.set_rng_state(state_dict["rng"])
        self._seconds = state_dict["seconds"]
        self._before = Costs(**state_dict["costs"])
        self._deal()

    def close(self) -> None:
        """At the end of the run; where a signal has stopped this worker, it leaves in the middle."""
        if self._signals.received:
            self.members.leave()
        self._method.close()


def run_elastic(
    config: RunConfig,
    folder: Path,
    options: ElasticOptions,
    observers: Sequence[Observer] = (),
    *,
    resume: bool,
) -> int:
    """Be one worker, to the end of the run; returns the signal that stopped it, or 0.

    Args:
        config: the run.
        folder: of this worker, for its record and its checkpoints.
        options: which worker it is.
        observers: get every line of its record.
        resume: go on from its own checkpoint, as far as it is further than the run.
    """
    # torchft would print every question of every worker.
    os.environ.setdefault("RUST_LOG", "warn")
    torch.set_num_threads(1)
    with StopSignals() as signals:
        problem = Problem(config)
        try:
            with signals.raising():
                worker = interruptible(lambda: ElasticWorker(problem, options, signals))
        except Stopped as stopped:
            return stopped.signum
        run = Run(worker, folder, observers=observers, resume=resume, label=options.name)
        signum = run.train()
        run.close()
    return signum
