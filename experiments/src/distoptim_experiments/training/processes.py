"""Real workers: this process is a rank of one of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, final

import torch

from distoptim_experiments.training import shards, slowdown
from distoptim_experiments.training.evaluation import goes_on, score, worker_accuracy
from distoptim_experiments.training.methods import registry
from distoptim_experiments.training.methods.base import Costs
from distoptim_experiments.training.problem import Problem
from distoptim_experiments.training.signals import StopSignals
from distoptim_experiments.training.vote import StopVote
from distoptim_experiments.training.workers import Workers
from distoptim_experiments.training.world import World


@final
class Processes(Workers):
    """One rank of a run; making it is collective too.

    The clock of a training step covers everything from fetching the batch to the end of
    `average()`. Evaluation and checkpoints lie outside of it, between barriers, so that no worker's
    waiting for them is counted.

    Args:
        problem: what is learned.
        world: the ranks.
        signals: what tells this process to stop.
    """

    def __init__(self, problem: Problem, world: World, signals: StopSignals) -> None:
        self.problem = problem
        self.seat = world.seat
        self._world = world
        self._batches = problem.batches(world.seat.worker)
        self._model = problem.model()
        self._method = registry.build(self._model, problem.config)
        self._vote = StopVote(world, signals)
        self._made = 0
        self._step_s = 0.0
        self._seconds = 0.0
        # Of the processes that made the run's steps so far.
        self._before = Costs()

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """This rank's alone; the others are in processes of their own."""
        return [self._method.optimizer]

    @property
    def parameters(self) -> int:
        """Of the whole model, also where this rank holds a shard."""
        return sum(p.numel() for p in self._model.parameters())

    def begin(self) -> None:
        """All begin together."""
        self._model.train()
        self.barrier()

    def step(self, step: int) -> Sequence[float]:
        """On the worker's next batch; slowed down first, where the run says so."""
        begin = time.perf_counter()
        losses = [self._local_step(step)]
        if self.problem.config.equal_time:
            while self._method.rounds <= step:
                losses.append(self._local_step(step + len(losses)))
        self._step_s = time.perf_counter() - begin
        self._seconds += self._step_s
        self._made += 1
        return losses

    def _local_step(self, step: int) -> float:
        slowdown.wait(self.problem.config, worker=self.seat.worker, step=step)
        return self._method.step(*next(self._batches))

    def seconds(self) -> float:
        """By this rank's clock."""
        return self._seconds

    def evaluate(self) -> dict[str, float]:
        """The others wait while worker 0 evaluates."""
        own = self._world.gather(worker_accuracy(self._model, self.problem.data))
        found: dict[str, float] = {}
        with self._method.averaged():
            # All ranks of a worker, since FSDP2 gathers parameters from all of them.
            if self.seat.worker == 0:
                found = {
                    **score(self._model, self.problem.data),
                    "worker_accuracy": sum(own) / len(own),
                }
        self.barrier()
        return found

    def verdict(self, losses: Sequence[float]) -> int:
        """What all have voted for."""
        return self._vote.verdict(self._made, self._step_s, goes_on(losses))

    def so_far(self) -> dict[str, float | None]:
        """By its own clock."""
        return self._method.so_far(self._costs(), self._seconds)

    def totals(self) -> dict[str, Any]:
        """Seconds are means over the ranks, bytes are each worker's, of all its ranks.

        Syncs and what is told of rounds are this rank's.
        """
        own = {"seconds": self._seconds, **asdict(self._costs())}
        ranks = self._world.gather(own)
        means = {
            name: _mean([rank[name] for rank in ranks])
            for name in ("seconds", "exposed_s", "overhead_s", "hidden_s")
        }
        return {
            **means,
            "syncs": own["syncs"],
            "bytes": sum(rank["bytes"] for rank in ranks[: self.seat.island_size]),
            **self._method.stats(),
        }

    def _costs(self) -> Costs:
        """Since the start of the run, over all processes that made it."""
        return self._before + self._method.costs()

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self._world.barrier()

    def state_dict(self) -> dict[str, Any]:
        """Of this rank; waits for what is in flight."""
        return {
            **shards.state_dict(self._model, self._method.optimizer, self.problem.config),
            "method": self._method.state_dict(),
            "batches": self._batches.state_dict(),
            "rng": torch.get_rng_state(),
            "seconds": self._seconds,
            "costs": asdict(self._costs()),
        }

    def load_state_dict(self, state_dict: dict[str, Any], *, own: bool) -> None:
        """Of another worker all but its place in the data and what its method remembers."""
        shards.load_state_dict(self._model, self._method.optimizer, self.problem.config, state_dict)
        torch.set_rng_state(state_dict["rng"])
        self._seconds = state_dict["seconds"]
        self._before = Costs(**state_dict["costs"])
        if own:
            self._batches.load_state_dict(state_dict["batches"])
            self._method.load_state_dict(state_dict["method"])

    def close(self) -> None:
        """What is told now comes too late to stop: the last vote is only read, so that nothing stays
        in flight."""
        self._vote.close()
        self._method.close()


def _mean(values: Sequence[float | None]) -> float | None:
    """None where it is not measured."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
