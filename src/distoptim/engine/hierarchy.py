"""Groups of neighbours that average more often: blocking means between the algorithm's own over all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

from distoptim.comm import (
    CommunicationError,
    Communicator,
    ProcessGroup,
    ProcessGroupCommunicator,
    SingleWorker,
    connect,
    ranks_of,
    world_size,
)
from distoptim.comm.mesh import WorkerMesh
from distoptim.engine.calls import Calls, EngineCalls
from distoptim.engine.clock import Clock
from distoptim.engine.engine import Engine, Inner
from distoptim.engine.identity import Kind
from distoptim.fragments import Flat
from distoptim.periods import Fixed, Tau, level_periods
from distoptim.rule import Average


@final
class Hierarchy(Calls):
    """Of an engine over all workers and of one more per level, inside a smaller group every so many steps.

    A level's mean comes before the algorithm's launch where both fall on one step, so that the members
    of a group send the same; the workers' mean is what it would be without levels.

    Every call begins at the levels, shortest first: to these means comes first whoever is elsewhere, too.

    Args:
        engine: the algorithm's, over all workers.
        communicators: period in local steps -> the level's group; see `check_levels`.
        inner: of the inner optimizer.
        timeout_s: bound of every wait, in seconds.
    """

    def __init__(
        self,
        engine: Engine,
        communicators: Mapping[int, Communicator],
        *,
        inner: Inner,
        timeout_s: float,
    ) -> None:
        super().__init__(engine, self._tick)
        self._all = EngineCalls(engine)
        levels = [
            Engine(
                [sync.fragment for sync in engine.syncs],
                Average(carry=False),
                Clock(Fixed(period), 0),
                communicator,
                inner=Inner(inner.optimizer),
                watch=engine.watch,
                timeout_s=timeout_s,
                # A worker weighs in its group what it does among all.
                weights=engine.weights,
                counters=engine.counters,
                # Where nobody in a group is finite, the algorithm's own mean, over more workers, brings
                # them all back.
                may_be_empty=True,
            )
            for period, communicator in communicators.items()
        ]
        self._levels = [EngineCalls(level) for level in levels]
        self._begin()

    def _tick(self) -> None:
        """Average inside the groups what is due, then let the algorithm do its part."""
        self.engine.check_local()
        clock = self.engine.clock
        was_synchronous = clock.synchronous
        tau = clock.tau
        for level in self._present():
            with self._passed_on(level):
                level.tick()
        self._all.tick()
        if was_synchronous and not clock.synchronous:
            self._begin()
        elif clock.tau != tau:
            self._align()

    def flush(self) -> None:
        """A new round begins at all levels."""
        self.engine.check_local()
        for level in self._present():
            with self._passed_on(level):
                level.flush()
        self._all.flush()
        self._begin()

    def meet(self, kind: Kind, *, limit_s: float | None = None) -> None:
        """By a message in each group."""
        self._meet_levels(kind, limit_s)
        self._all.meet(kind, limit_s=limit_s)

    def means(self, kind: Kind, *, weight: float = 1.0, may_be_empty: bool = False) -> list[Flat]:
        """Over all workers alone, who also meet in their groups."""
        # What is wrong here is told in the place of the first message.
        self.engine.watch.check()
        self._meet_levels(kind)
        return self._all.means(kind, weight=weight, may_be_empty=may_be_empty)

    def _meet_levels(self, kind: Kind, limit_s: float | None = None) -> None:
        """Before what is in flight is waited for: who waits in a level's mean starts no second stage of it."""
        self.engine.reducer.check()
        for level in self._present():
            with self._passed_on(level):
                level.meet(kind, limit_s=limit_s)

    def adopt(self, means: Sequence[Flat]) -> None:
        """A new round begins at all levels."""
        self._all.adopt(means)
        self._begin()

    def tell(self, error: Exception | str) -> None:
        """In the groups to which others come before they wait for the next mean over all, then there."""
        cause = self._all.cause(error)
        if cause is None:
            return
        # In the middle of a call over all workers the levels' part of it is behind the others.
        if not self._all.coming:
            self._tell_levels(cause)
        self._all.tell(cause)

    def _tell_levels(self, cause: str) -> None:
        engine = self.engine
        over = engine.synchronous_phase_is_over
        if engine.clock.synchronous and not over:
            return
        # The step at which the others wait for a mean over all, in which they are told below.
        waits_at = min(sync.next_launch for sync in engine.syncs) + engine.clock.delay
        for level in self._levels:
            if over or min(sync.next_launch for sync in level.engine.syncs) <= waits_at:
                level.tell(cause)

    @contextlib.contextmanager
    def _passed_on(self, level: EngineCalls) -> Iterator[None]:
        """Around means of a level: workers that are not in its group hear of a failure, too."""
        try:
            yield
        except CommunicationError:
            failed = level.engine.reducer
            longer = self._levels[self._levels.index(level) + 1 :]
            for calls in (*longer, self):
                # Where a worker is gone, others see it as soon as this one leaves.
                if failed.mismatched:
                    calls.tell(failed.reason)
                reducer = calls.engine.reducer
                if not reducer.mismatched:
                    reducer.give_up(failed.reason)
                    reducer.mismatched = failed.mismatched
            raise

    def leave(self) -> None:
        """All workers' group, and the levels'."""
        for calls in (self._all, *self._levels):
            calls.leave()

    def state_dict(self) -> dict[str, Any]:
        """The engine's, and of each level when it averaged last."""
        levels = {
            level.engine.clock.tau: [(sync.launched, sync.samples) for sync in level.engine.syncs]
            for level in self._levels
        }
        return {**self._all.state_dict(), "levels": levels}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Into all engines; levels that it does not know begin anew."""
        self._all.load_state_dict(saved)
        self._begin()
        for level in self._levels:
            records = saved.get("levels", {}).get(level.engine.clock.tau, [])
            for sync, (launched, samples) in zip(level.engine.syncs, records, strict=False):
                sync.launched = launched
                sync.samples = min(samples, sync.samples)

    def _present(self) -> Sequence[EngineCalls]:
        """While the workers average after every step, groups have nothing to add, and nobody comes to them."""
        return [] if self.engine.clock.synchronous else self._levels

    def _begin(self) -> None:
        """Begin rounds at all levels here, with nothing made since the last mean."""
        for level in self._levels:
            for sync in level.engine.syncs:
                sync.launched = self.engine.step
                sync.samples = self.engine.weights.total
        self._align()

    def _align(self) -> None:
        """Place the levels' means so that one comes with every launch of the algorithm.

        Periods divide its tau.
        """
        step = self.engine.step
        for level in self._levels:
            every = level.engine.clock.tau
            for sync, main in zip(level.engine.syncs, self.engine.syncs, strict=True):
                sync.next_launch = step + (main.next_launch - step - 1) % every + 1
            level.engine.resume_at(step)


def check_levels(
    levels: Mapping[int, ProcessGroup] | None,
    mesh: WorkerMesh,
    workers: Communicator,
    *,
    tau: Tau,
) -> dict[int, ProcessGroup]:
    """The groups of the levels by period, shortest first.

    Raises:
        ValueError: as `level_periods`; a group that is none, that this rank is not in, that has other
            ranks than the workers, or that holds other shards of this rank's parameters.
    """
    if levels is None:
        return {}
    if not isinstance(levels, Mapping):
        raise ValueError(f"levels={levels!r}: allowed is a mapping of periods to process groups")
    if not levels:
        return {}
    periods = level_periods(levels, tau)
    if isinstance(workers, SingleWorker):
        return {}
    if not isinstance(workers, ProcessGroupCommunicator):
        raise ValueError(
            f"levels= beside {workers!r}: groups need workers in a process group to be part of"
        )
    out: dict[int, ProcessGroup] = {}
    for period in periods:
        group = levels[period]
        if group is None or world_size(group) < 1:
            raise ValueError(
                f"levels[{period}]={group!r}: allowed is a process group that this worker is a member "
                "of"
            )
        if others := set(ranks_of(group)) - set(workers.ranks):
            raise ValueError(
                f"levels[{period}]: ranks {sorted(others)} are not among the workers {workers.ranks}"
            )
        mesh.check(group)
        out[period] = group
    return out


def connect_levels(
    groups: Mapping[int, ProcessGroup], timeout_s: float, streams: int | str
) -> dict[int, Communicator]:
    """The communicators of the levels by period.

    Collective in each group, so only once all workers are known to have the same levels.
    """
    return {
        period: connect(group, timeout_s, streams=streams)
        if world_size(group) > 1
        else SingleWorker()
        for period, group in groups.items()
    }
