"""Averaging at several levels: blocking means inside small groups, between the algorithm's own over all workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch.distributed as dist
from torch import Tensor

from distoptim import checks
from distoptim.algorithms.rules import Average
from distoptim.comm import Communicator, ProcessGroupCommunicator, SingleWorker, connect, world_size
from distoptim.comm.islands import Island
from distoptim.engine import Engine
from distoptim.period import Tau


class Levels:
    """Keeps an engine and one more per level, which averages inside a smaller group every so many local steps.

    A level's mean comes before the algorithm's launch where both fall on one step, so that the members of a group
    send the same; the workers' mean is what it would be without levels.

    Args:
        engine: the algorithm's, over all workers.
        communicators: period in local steps -> the level's group; see `connect_levels`.
        forget: clears the inner optimizer's state of the given parameters.
    """

    def __init__(self, engine: Engine, communicators: Mapping[int, Communicator],
                 forget: Callable[[Sequence[Tensor]], None]) -> None:
        self.engine = engine
        fragments = [slot.fragment for slot in engine.slots]
        self.inner = [Engine(fragments, Average(carry=False), communicator, tau=period, delay=0,
                             timeout_s=engine.timeout_s, inner_lr=lambda _: 0.0, forget=forget)
                      for period, communicator in communicators.items()]
        for level in self.inner:
            level.counters = engine.counters
        self.align()

    def tick(self) -> None:
        """One local step is done: average inside the groups what is due, then let the algorithm do its part."""
        for level in self.inner:
            try:
                level.tick()
            except FloatingPointError:
                # Nobody in the group is finite: the algorithm's own mean, over more workers, heals them all.
                continue
        self.engine.tick()

    def flush(self) -> None:
        """Average at all levels what was done since the last time, blocking; a new round begins at all of them."""
        for level in self.inner:
            level.flush()
        self.engine.flush()
        self.align()

    def align(self) -> None:
        """Place the levels' means so that one comes with every launch of the algorithm; periods divide its tau."""
        step = self.engine.step
        for level in self.inner:
            for slot, main in zip(level.slots, self.engine.slots, strict=True):
                slot.next_launch = step + (main.next_launch - step - 1) % level.tau + 1
                slot.launched = step
            level.resume_at(step)

    def close(self) -> None:
        """Leave all groups."""
        for engine in (*self.inner, self.engine):
            engine.close()


def connect_levels(levels: Mapping[int, dist.ProcessGroup] | None, island: Island, workers: Communicator, *, tau: Tau,
                   timeout_s: float) -> dict[int, Communicator]:
    """The communicators of the levels by period, shortest first.

    Raises:
        ValueError: periods that do not divide each other and tau, or a group that is none, that this rank is not in,
            that has other ranks than the workers, or that holds other shards of this rank's parameters.
    """
    if not levels or isinstance(workers, SingleWorker):
        return {}
    if not isinstance(levels, Mapping):
        raise ValueError(f"levels={levels!r}: allowed is a mapping of periods to process groups")
    if not isinstance(tau, int):
        raise ValueError(f"levels= beside tau={tau!r}: periods of levels must divide tau; allowed is an integer")
    if not isinstance(workers, ProcessGroupCommunicator):
        raise ValueError(f"levels= beside {workers!r}: groups need workers in a process group to be part of")
    out: dict[int, Communicator] = {}
    periods = sorted(checks.integer("period of levels", period, 1, tau - 1) for period in levels)
    for period, longer in zip(periods, [*periods[1:], tau], strict=True):
        group = levels[period]
        if longer % period:
            raise ValueError(f"levels={periods}, tau={tau}: {longer} is no multiple of {period}; allowed are periods "
                             "of which each divides the next, and the longest tau")
        if group is None or world_size(group) < 1:
            raise ValueError(f"levels[{period}]={group!r}: allowed is a process group that this worker is a member of")
        if others := set(dist.get_process_group_ranks(group)) - set(workers.ranks):
            raise ValueError(f"levels[{period}]: ranks {sorted(others)} are not among the workers {workers.ranks}")
        island.check(group)
        out[period] = connect(group, timeout_s) if world_size(group) > 1 else SingleWorker()
    return out
