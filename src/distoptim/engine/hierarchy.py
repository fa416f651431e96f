"""Groups of neighbours that average more often: blocking means between the algorithm's own over all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, final

from distoptim.comm import (
    Communicator,
    ProcessGroup,
    ProcessGroupCommunicator,
    SingleWorker,
    connect,
    ranks_of,
    world_size,
)
from distoptim.comm.mesh import WorkerMesh
from distoptim.engine.clock import Clock
from distoptim.engine.engine import Engine, Inner, Rounds
from distoptim.periods import Fixed, Tau, level_periods
from distoptim.rule import Average


@final
class Hierarchy(Rounds):
    """An engine over all workers and one more per level, inside a smaller group every so many steps.

    A level's mean comes before the algorithm's launch where both fall on one step, so that the members
    of a group send the same; the workers' mean is what it would be without levels.

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
        self.engine = engine
        self.levels = [
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
        engine.levels = self.levels
        self._begin()

    def tick(self) -> None:
        """Average inside the groups what is due, then let the algorithm do its part."""
        self.engine.check_local()
        clock = self.engine.clock
        was_synchronous = clock.synchronous
        tau = clock.tau
        # While the workers average after every step, groups have nothing to add.
        for level in [] if was_synchronous else self.levels:
            with self.engine.passed_on(level):
                level.tick()
        self.engine.tick()
        if was_synchronous and not clock.synchronous:
            self._begin()
        elif clock.tau != tau:
            self._align()

    def flush(self) -> None:
        """Average at all levels what was done since the last time; a new round begins at all."""
        self.engine.check_local()
        # While the workers average after every step, nobody comes to the groups.
        for level in [] if self.engine.clock.synchronous else self.levels:
            with self.engine.passed_on(level):
                level.flush()
        self.engine.flush()
        self._begin()

    @contextlib.contextmanager
    def join(self) -> Iterator[None]:
        """As `Engine.join`; the groups go on while anybody has data."""
        with self.engine.join(self.tick):
            yield
        self._begin()

    def state_dict(self) -> dict[str, Any]:
        """The engine's, and of each level when it averaged last."""
        levels = {
            level.clock.tau: [(sync.launched, sync.samples) for sync in level.syncs]
            for level in self.levels
        }
        return {**self.engine.state_dict(), "levels": levels}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Put a state that fits into all engines; levels that it does not know begin anew."""
        self.engine.load_state_dict(saved)
        self._begin()
        for level in self.levels:
            records = saved.get("levels", {}).get(level.clock.tau, [])
            for sync, (launched, samples) in zip(level.syncs, records, strict=False):
                sync.launched = launched
                sync.samples = min(samples, sync.samples)

    def close(self) -> None:
        """Leave all groups, also where something of one comes to light."""
        try:
            # Compares the local steps at all levels, for which their groups must still be there.
            self.engine.close()
        finally:
            for level in self.levels:
                level.reducer.close()

    def _begin(self) -> None:
        """Begin rounds at all levels here, with nothing made since the last mean."""
        for level in self.levels:
            for sync in level.syncs:
                sync.launched = self.engine.step
                sync.samples = self.engine.weights.total
        self._align()

    def _align(self) -> None:
        """Place the levels' means so that one comes with every launch of the algorithm.

        Periods divide its tau.
        """
        step = self.engine.step
        for level in self.levels:
            for sync, main in zip(level.syncs, self.engine.syncs, strict=True):
                sync.next_launch = step + (main.next_launch - step - 1) % level.clock.tau + 1
            level.resume_at(step)


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
