"""Averaging at several levels.

Blocking means inside small groups, between the algorithm's own over all workers.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from distoptim import checks
from distoptim.algorithms.rules import Average
from distoptim.comm import Communicator, ProcessGroupCommunicator, SingleWorker, connect, world_size
from distoptim.comm.mesh import WorkerMesh
from distoptim.engine import checkpoint
from distoptim.engine.engine import Engine
from distoptim.engine.join import join
from distoptim.periods import Tau, period_of


class Levels:
    """Keeps an engine and one more per level, which averages inside a smaller group every so many
    local steps.

    A level's mean comes before the algorithm's launch where both fall on one step, so that the
    members of a group send the same; the workers' mean is what it would be without levels.

    Args:
        engine: the algorithm's, over all workers.
        communicators: period in local steps -> the level's group; see `connect_levels`.
        forget: clears the inner optimizer's state of the given parameters.
    """

    def __init__(
        self,
        engine: Engine,
        communicators: Mapping[int, Communicator],
        forget: Callable[[Sequence[Tensor]], None],
    ) -> None:
        self.engine = engine
        fragments = [slot.fragment for slot in engine.slots]
        self.inner = [
            Engine(
                fragments,
                Average(carry=False),
                communicator,
                tau=period,
                delay=0,
                timeout_s=engine.timeout_s,
                inner_lr=lambda _: 0.0,
                forget=forget,
            )
            for period, communicator in communicators.items()
        ]
        for level in self.inner:
            level.counters = engine.counters
            # Where nobody in a group is finite, the algorithm's own mean, over more workers, heals
            # them all.
            level.may_be_empty = True
        self._begin()

    def tick(self) -> None:
        """One local step is done.

        Average inside the groups what is due, then let the algorithm do its part.
        """
        self.engine.check_local()
        pace = self.engine.pace
        before = pace.tau, pace.synchronous
        # While the workers average after every step, groups have nothing to add.
        for level in [] if pace.synchronous else self.inner:
            # A worker weighs in its group what it does among all.
            level.pace.samples, level.pace.left_at = pace.samples, pace.left_at
            level.tick()
        self.engine.tick()
        if before[1] and not pace.synchronous:
            self._begin()
        elif pace.tau != before[0]:
            self._align()

    def flush(self) -> None:
        """Average at all levels what was done since the last time, blocking.

        A new round begins at all of them.
        """
        self.engine.check_local()
        for level in self.inner:
            level.flush()
        self.engine.flush()
        self._begin()

    @contextlib.contextmanager
    def join(self) -> Iterator[None]:
        """See `AveragingOptimizer.join`."""
        with join(self.engine, self.tick):
            yield
        self._begin()

    def save(self) -> dict[str, Any]:
        """Everything needed to go on bit-equal, as plain data and tensors."""
        return {
            **checkpoint.save(self.engine),
            "levels": {
                level.tau: [(slot.launched, slot.samples) for slot in level.slots]
                for level in self.inner
            },
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Put a state that fits (see `checkpoint.check`) into the engines."""
        checkpoint.load(self.engine, saved)
        self._begin()
        for level in self.inner:
            for slot, (launched, samples) in zip(
                level.slots, saved.get("levels", {}).get(level.tau, []), strict=False
            ):
                slot.launched, slot.samples = launched, min(samples, slot.samples)

    def _begin(self) -> None:
        """Begin rounds at all levels here, with nothing made since the last mean."""
        for level in self.inner:
            for slot in level.slots:
                slot.launched, slot.samples = self.engine.step, self.engine.pace.samples or 0.0
        self._align()

    def _align(self) -> None:
        """Place the levels' means so that one comes with every launch of the algorithm.

        Periods divide its tau.
        """
        step = self.engine.step
        for level in self.inner:
            for slot, main in zip(level.slots, self.engine.slots, strict=True):
                slot.next_launch = step + (main.next_launch - step - 1) % level.tau + 1
            level.resume_at(step)

    def close(self) -> None:
        """Leave all groups."""
        for engine in (*self.inner, self.engine):
            engine.close()


def check_periods(periods: Iterable[object], tau: Tau) -> list[int]:
    """The periods of levels, shortest first.

    Raises:
        ValueError: they do not divide each other and every tau that can be chosen, or that is not
            known before.
    """
    taus = period_of(tau).choices
    if taus is None:
        raise ValueError(
            f"levels= beside tau={tau!r}: it may choose a tau that the periods of levels do not divide; "
            "allowed are an integer, Schedule, and PostLocal with one of them"
        )
    if min(taus) == 1:
        raise ValueError(
            f"levels= beside tau={tau!r}: all average after every local step; allowed is a tau above 1"
        )
    found = sorted(
        checks.integer("period of levels", period, 1, min(taus) - 1) for period in periods
    )
    for period, longer in [
        *itertools.pairwise(found),
        *((found[-1], t) for t in sorted(taus) if found),
    ]:
        if longer % period:
            raise ValueError(
                f"levels={found}, tau={tau}: {longer} is no multiple of {period}; allowed are periods "
                "of which each divides the next, and the longest tau"
            )
    return found


def check_levels(
    levels: Mapping[int, dist.ProcessGroup] | None,
    island: WorkerMesh,
    workers: Communicator,
    *,
    tau: Tau,
) -> dict[int, dist.ProcessGroup]:
    """The groups of the levels by period, shortest first.

    Raises:
        ValueError: as `check_periods`; a group that is none, that this rank is not in,
            that has other ranks than the workers, or that holds other shards of this rank's
            parameters.
    """
    if not levels:
        return {}
    if not isinstance(levels, Mapping):
        raise ValueError(f"levels={levels!r}: allowed is a mapping of periods to process groups")
    periods = check_periods(levels, tau)
    if isinstance(workers, SingleWorker):
        return {}
    if not isinstance(workers, ProcessGroupCommunicator):
        raise ValueError(
            f"levels= beside {workers!r}: groups need workers in a process group to be part of"
        )
    out: dict[int, dist.ProcessGroup] = {}
    for period in periods:
        group = levels[period]
        if group is None or world_size(group) < 1:
            raise ValueError(
                f"levels[{period}]={group!r}: allowed is a process group that this worker is a member of"
            )
        if others := set(dist.get_process_group_ranks(group)) - set(workers.ranks):
            raise ValueError(
                f"levels[{period}]: ranks {sorted(others)} are not among the workers {workers.ranks}"
            )
        island.check(group)
        out[period] = group
    return out


def connect_levels(
    groups: Mapping[int, dist.ProcessGroup], timeout_s: float
) -> dict[int, Communicator]:
    """The communicators of the levels by period; collective in each group, so only once all workers
    are known to have the same levels."""
    return {
        period: connect(group, timeout_s) if world_size(group) > 1 else SingleWorker()
        for period, group in groups.items()
    }
