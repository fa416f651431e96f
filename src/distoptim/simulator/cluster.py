"""Virtual workers in one process, in lockstep.

The same optimizers and engine, another communicator and clock.
"""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from distoptim import checks
from distoptim.comm import Communicator
from distoptim.comm.compressed import CodedHandle
from distoptim.comm.handles import TwoStageHandle
from distoptim.engine import checkpoint
from distoptim.engine.fragment_sync import PendingMean
from distoptim.module_state import parts_of
from distoptim.optimizer import AveragingOptimizer, average_together
from distoptim.simulator.churn import Churn
from distoptim.simulator.compute import Compute
from distoptim.simulator.fabric import Fabric, VirtualCommunicator, VirtualHandle
from distoptim.simulator.membership import Membership, VirtualElastic
from distoptim.simulator.network import Network

Make = Callable[..., AveragingOptimizer]
GradientMean = Callable[[Sequence[Sequence[Tensor]]], object]


class Cluster:
    """`workers` virtual workers, each with a model and an optimizer of its own, on a virtual clock.

    Deterministic: the same arguments and gradients give the same parameters and times, whatever the
    number of threads. Memory and time grow linearly with the number of workers.

    Args:
        workers: how many, >= 1.
        model: makes one worker's model; all start from worker 0's.
        optimizer: called as optimizer(parameters, communicator=...), must pass the communicator on.
        compute: how long local steps take; None: no time.
        network: what means cost; None: nothing.
        threads: workers computed at the same time; default one per processor core.
        synchronous: average the gradients before every step, as DDP does; or what does that instead, called
            with the gradients of all workers for each parameter, in whose place it puts the mean.
        scale: a byte of payload counts as so many, to time a large model with a small one.
        churn: when workers are lost, and come back; None: all are there all the time.
        heartbeat_s: with `churn`, how long the others wait for one that was lost, in seconds; default that of
            `distoptim lighthouse`.

    Attributes:
        models, optimizers: by worker; of one that is away, those that it had.
        membership: who is there; None without `churn`.

    Raises:
        ValueError: a value outside its range, or `churn` with `synchronous`, which has no other workers.
    """

    def __init__(
        self,
        *,
        workers: int,
        model: Callable[[], torch.nn.Module],
        optimizer: Make,
        compute: Compute | None = None,
        network: Network | None = None,
        threads: int | None = None,
        synchronous: bool | GradientMean = False,
        scale: float = 1.0,
        churn: Churn | None = None,
        heartbeat_s: float = 5.0,
    ) -> None:
        checks.integer("workers", workers, 1)
        if churn is not None and synchronous:
            raise ValueError(f"churn={churn!r} with synchronous: allowed are workers with rounds")
        self.fabric = Fabric(workers, network, scale=scale)
        self.membership: Membership | None = None
        if churn is not None:
            self.membership = Membership(
                self.fabric, churn, heartbeat_s=heartbeat_s, come=self._come
            )
        self._make_model = model
        self._make_optimizer = optimizer
        self.models = [model() for _ in range(workers)]
        self.optimizers = [
            optimizer(m.parameters(), communicator=self._communicator(rank, joins=False))
            for rank, m in enumerate(self.models)
        ]
        self.steps = 0
        self._compute = compute
        self._synchronous = synchronous
        threads = checks.integer("threads", os.cpu_count() if threads is None else threads, 1)
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    @property
    def present(self) -> Sequence[int]:
        """The workers that are there."""
        if self.membership is None:
            return range(len(self.models))
        return self.membership.present

    def _communicator(self, rank: int, *, joins: bool) -> Communicator:
        if self.membership is None:
            return VirtualCommunicator(self.fabric, rank)
        return VirtualElastic(self.membership, rank, joins=joins)

    def _come(self, rank: int) -> None:
        """A worker comes back as one that knows nothing; its optimizer takes over what the others share."""
        self.models[rank] = self._make_model()
        self.optimizers[rank] = self._make_optimizer(
            self.models[rank].parameters(), communicator=self._communicator(rank, joins=True)
        )

    def step(self, loss: Callable[[torch.nn.Module, int], Tensor]) -> list[float]:
        """One local step of every worker, then `average()`; returns the workers' losses.

        Where rounds last equally long (`EqualTime`), a worker that has come to the end of its round
        makes no step until all have.

        Args:
            loss: called as loss(model, rank), on several threads.
        """
        ranks = self._ready()
        run: Callable[..., Iterable[Any]] = self._pool.map if self._pool else map
        losses = list(run(lambda rank: self._backward(loss, rank), ranks))
        if self._synchronous:
            self._average_gradients()
        list(run(self._local_step, ranks))
        self._count(ranks, 1, losses=losses)
        return losses

    def advance(self, steps: int) -> None:
        """So many local steps of every worker in which only time passes and means travel.

        Nothing is computed, and the virtual clocks go from one launch or merge to the next.
        """
        end = self.steps + steps
        while self.steps < end:
            idle = min(self.optimizers[rank].engine.idle for rank in self.present)
            # A worker may be lost at any step.
            idle = 0 if self.membership else idle
            self._count(self._ready(), min(idle + 1, end - self.steps))

    def _ready(self) -> list[int]:
        """The workers that do not wait for others at the end of their round."""
        return [rank for rank in self.present if not self.optimizers[rank].engine.waits]

    def _count(self, ranks: Sequence[int], steps: int, losses: Sequence[float] = ()) -> None:
        """Let these workers' local steps take their time; merge and launch what is due after the last."""
        for rank in ranks:
            engine = self.optimizers[rank].engine
            self._spend(rank, engine.step, steps)
            engine.skip(steps - 1)
        self.steps += steps
        all_step = len(ranks) == len(self.present)
        if self.membership is not None:
            self.membership.part()
            losses = [x for rank, x in zip(ranks, losses, strict=False) if rank in self.present]
        together = [self.optimizers[rank] for rank in self.present]
        with self._expected():
            average_together(together, losses=losses if all_step else None)

    def _spend(self, rank: int, first: int, steps: int) -> None:
        if self._compute is None:
            return
        clock = self.fabric.clocks[rank]
        # One after the other: a product would be rounded otherwise.
        for step in range(first, first + steps):
            clock += self._compute.seconds(rank, step)
        self.fabric.clocks[rank] = clock

    @contextlib.contextmanager
    def _expected(self) -> Iterator[None]:
        """With equal gradients all workers compute the same, which is no reason for a warning."""
        if not self._synchronous:
            yield
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="all workers have sent equal parameters")
            yield

    def mean_model(self) -> torch.nn.Module:
        """A copy of the first worker's model with the mean parameters and statistics; takes no time.

        Of the workers whose values are finite, as in every mean; of all if there are none.
        """
        models = [self.models[rank] for rank in self.present]
        mean = copy.deepcopy(models[0])
        with torch.no_grad():
            sound = [m for m in models if all(bool(torch.isfinite(t).all()) for t in _tensors(m))]
            tensors = zip(*(_tensors(m) for m in sound or models), strict=True)
            for target, values in zip(_tensors(mean), tensors, strict=True):
                total = values[0].to(torch.float64)
                for value in values[1:]:
                    total = total + value
                target.copy_(total / len(values))
        return mean

    def seconds(self) -> float:
        """The virtual time at which the last worker stands."""
        return max(self.fabric.clocks[rank] for rank in self.present)

    def stats(self) -> dict[str, Any]:
        """`AveragingOptimizer.stats` averaged over the workers that are there, and `seconds`.

        Of one that has come back, since then.
        """
        each = [self.optimizers[rank].stats() for rank in self.present]
        return {
            **{key: sum(s[key] for s in each) / len(each) for key in each[0]},
            "seconds": self.seconds(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit-equal, clocks included, as tensors and plain data.

        Takes no virtual time.
        """
        self.fabric.frozen = True
        states = [self._state(rank) if rank in self.present else None for rank in self._all]
        self.fabric.frozen = False
        return {
            "workers": states,
            "clocks": self.fabric.clocks,
            "free_at": self.fabric.free_at,
            "steps": self.steps,
            "membership": self.membership and self.membership.state_dict(),
        }

    @property
    def _all(self) -> Sequence[int]:
        return range(len(self.models))

    def _state(self, rank: int) -> dict[str, Any]:
        optimizer = self.optimizers[rank]
        return {
            "model": self.models[rank].state_dict(),
            "optimizer": optimizer.state_dict(),
            "counters": _counters(optimizer),
            "pending": [_times(sync.pending) for sync in optimizer.engine.syncs],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()`, in a new cluster made with the same arguments."""
        self.fabric.clocks[:] = state_dict["clocks"]
        self.fabric.free_at = state_dict["free_at"]
        if self.membership is not None:
            self.membership.load_state_dict(state_dict["membership"])
        for rank in self.present:
            self._load(rank, state_dict["workers"][rank])
        self.steps = state_dict["steps"]

    def _load(self, rank: int, saved: dict[str, Any]) -> None:
        self._be_among(rank, saved["optimizer"])
        optimizer = self.optimizers[rank]
        self.models[rank].load_state_dict(saved["model"])
        # Before the rounds, which may go by what was computed so far.
        vars(optimizer.engine.counters).update(saved["counters"])
        optimizer.load_state_dict(saved["optimizer"])
        for sync, times in zip(optimizer.engine.syncs, saved["pending"], strict=True):
            if sync.pending is not None and times is not None:
                sync.pending.handle = self.fabric.in_flight(rank, sync.buffer.tensor, *times)
        optimizer.engine.resume_at(optimizer.engine.step)

    def _be_among(self, rank: int, saved: dict[str, Any]) -> None:
        """Where workers come and go: have the optimizer laid out for as many as were in its last mean."""
        if self.membership is None:
            return
        communicator = VirtualElastic(self.membership, rank, joins=False)
        rounds = saved[checkpoint.KEY]
        communicator.be_at(rounds["rank"], rounds["workers"])
        self.optimizers[rank] = self._make_optimizer(
            self.models[rank].parameters(), communicator=communicator
        )

    def _backward(self, loss: Callable[[torch.nn.Module, int], Tensor], rank: int) -> float:
        value = loss(self.models[rank], rank)
        value.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        return value.item()

    def _local_step(self, rank: int) -> None:
        self.optimizers[rank].step()
        self.optimizers[rank].zero_grad()

    @torch.no_grad()
    def _average_gradients(self) -> None:
        parameters = zip(*(m.parameters() for m in self.models), strict=True)
        found = [[p.grad for p in params if p.grad is not None] for params in parameters]
        average = self._synchronous if callable(self._synchronous) else _average
        average([gradients for gradients in found if gradients])


def _average(gradients: Sequence[Sequence[Tensor]]) -> None:
    for workers in gradients:
        torch._foreach_copy_(list(workers), [torch.stack(list(workers)).mean(0)] * len(workers))


def _counters(optimizer: AveragingOptimizer) -> dict[str, Any]:
    optimizer.engine.counters.collect()
    not_kept = ("unread", "spans", "follow", "virtual")
    return {
        name: value
        for name, value in vars(optimizer.engine.counters).items()
        if name not in not_kept
    }


def _times(pending: PendingMean | None) -> tuple[float, float, int | None] | None:
    """Launch and end of a mean in flight, and of how many it is; None for one that took no time."""
    handle = None if pending is None else pending.handle
    workers = None if handle is None else handle.workers
    if isinstance(handle, CodedHandle):
        handle = handle.carried
    launched_at = 0.0 if handle is None else handle.launched_at
    if isinstance(handle, TwoStageHandle):
        handle = handle.second
    return (launched_at, handle.end(), workers) if isinstance(handle, VirtualHandle) else None


def _tensors(module: torch.nn.Module) -> list[Tensor]:
    """What is averaged: what is trained, and statistics."""
    parts = parts_of([module], ())
    return [*parts.trained.values(), *parts.statistics.values()]
