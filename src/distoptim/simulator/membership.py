"""Virtual workers that come and go: who is there, and the means of those.

As `distoptim.comm.Elastic` does it, by the same calls: each mean is made by those that are there, one
after the other; who has just come takes part in one with nothing, and is given with it what all share; a
mean during which a worker is lost never comes.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor
from torch.utils._pytree import tree_leaves

from distoptim import checks
from distoptim.comm import CatchUp, Communicator, FinishedHandle, Handle, MeanLost
from distoptim.comm.communicator import Member
from distoptim.simulator.churn import BACK, LOST, Change, Churn
from distoptim.simulator.fabric import (
    Collective,
    Fabric,
    VirtualHandle,
    average,
    gather,
    swap,
)

MakeMean = Callable[[Communicator, Tensor, float], None]
# No virtual worker is waited for in real time but by threads that compute; this is for those that never come.
_NEVER_S = 600.0


@final
@dataclass
class Launch:
    """What a worker brings to a mean."""

    of: VirtualElastic
    member: Member
    buffer: Tensor
    mean: MakeMean
    position: dict[str, Any]
    handle: VirtualHandle


@final
class Membership:
    """Who of the virtual workers is there.

    Args:
        fabric: whose clocks they have.
        churn: when who comes and goes.
        heartbeat_s: a mean begins no earlier than so long after the loss of a worker, >= 0.
        come: makes a worker that comes, which takes part in the mean that the others have launched.

    Attributes:
        present: the workers that are there, sorted.
        generation: how often that has changed.
        happened: what has happened, in the order in which it was noticed.

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(
        self, fabric: Fabric, churn: Churn, *, heartbeat_s: float, come: Callable[[int], object]
    ) -> None:
        self.fabric = fabric
        self.present = list(range(fabric.workers))
        self.generation = 0
        self.happened: list[Change] = []
        self._heartbeat_s = checks.number("heartbeat_s", heartbeat_s, 0, 1e9)
        self._come = come
        self._later = churn.changes(fabric.workers)
        self._next: Change | None = next(self._later, None)
        self._changes: list[deque[Change]] = [deque() for _ in self.present]
        # Of each worker, how many of its changes have happened.
        self._made = [0] * fabric.workers
        self._not_before_s = 0.0
        self._launched = [0] * fabric.workers
        self._open: dict[int, Collective] = {}
        self._threads = ThreadPoolExecutor(fabric.workers)

    # ---- who is there -----------------------------------------------------------------------------

    def _change(self, worker: int, until_s: float) -> Change | None:
        """The next one of a worker, if it comes until then."""
        while self._next is not None and self._next.seconds <= until_s:
            self._hear()
        mine = self._changes[worker]
        return mine[0] if mine and mine[0].seconds <= until_s else None

    def _hear(self) -> None:
        assert self._next is not None
        self._changes[self._next.worker].append(self._next)
        self._next = next(self._later, None)

    def _happens(self, change: Change) -> None:
        self._changes[change.worker].popleft()
        self._made[change.worker] += 1
        self.happened.append(change)
        self.generation += 1
        if change.what == BACK:
            self.present = sorted([*self.present, change.worker])
            return
        self.present.remove(change.worker)
        if change.what == LOST:
            self._not_before_s = max(self._not_before_s, change.seconds + self._heartbeat_s)

    def part(self) -> None:
        """Miss those whose clocks have come to where they are lost, or leave."""
        for worker in list(self.present):
            change = self._change(worker, self.fabric.clocks[worker])
            if change is not None:
                self._happens(change)

    def _newcomer(self, at_s: float) -> Change | None:
        """Who comes with a mean that all others have launched by then."""
        away = [worker for worker in range(self.fabric.workers) if worker not in self.present]
        coming = (self._change(worker, at_s) for worker in away)
        return next((change for change in coming if change is not None), None)

    # ---- their means ------------------------------------------------------------------------------

    def arrive(self, of: VirtualElastic, member: Member, buffer: Tensor, mean: MakeMean) -> Handle:
        """A worker launches its next mean; made when the last has."""
        number = self._launched[of.worker]
        self._launched[of.worker] += 1
        collective = self._open.setdefault(number, Collective())
        at_s = self.fabric.clocks[of.worker]
        handle = VirtualHandle(self.fabric, of.worker, buffer, collective, at=at_s)
        launch = Launch(of, member, buffer, mean, member.position(buffer), handle)
        collective.brought[of.worker] = launch
        collective.arrived_at = max(collective.arrived_at, at_s)
        if len(collective.brought) == len(self.present):
            self._all_but_newcomers(number, collective)
        return handle

    def _all_but_newcomers(self, number: int, collective: Collective) -> None:
        change = self._newcomer(collective.arrived_at)
        if change is None:
            del self._open[number]
            self._make(collective)
            return
        self._happens(change)
        self._launched[change.worker] = number
        self.fabric.clocks[change.worker] = collective.arrived_at
        # It arrives at this mean itself.
        self._come(change.worker)

    def _make(self, collective: Collective) -> None:
        launches = [collective.brought[worker] for worker in sorted(collective.brought)]
        collective.brought = {}
        giver = next(launch for launch in launches if not launch.of.joins)
        start_s = max(collective.arrived_at, self.fabric.free_at, self._not_before_s)
        newcomers = [launch for launch in launches if launch.of.joins]
        for launch in newcomers:
            position = json.loads(json.dumps(giver.position))
            launch.handle.caught_up = CatchUp(position, giver.member.give())
            start_s += self.fabric.cost_s(_nbytes(launch.handle.caught_up.state), 2)
        # With one that comes, its transfer and the mean are taken to be soon enough.
        risk = [] if newcomers else [launch.of.worker for launch in launches]
        group = ThreadGroup(len(launches), start_s, self.fabric, lambda s: self._loss(risk, s))
        list(self._threads.map(lambda each: _take_part(group, *each), enumerate(launches)))
        collective.ends_at = group.ends_s
        collective.failure = group.failure
        self.fabric.free_at = group.ends_s
        for rank, launch in enumerate(launches):
            launch.handle.workers = len(launches)
            if group.failure is None:
                launch.of.taken_part(rank, len(launches))

    def _loss(self, workers: Sequence[int], until_s: float) -> Change | None:
        """Of these, the first that is lost until then."""
        changes = (self._change(worker, until_s) for worker in workers)
        return min((c for c in changes if c is not None and c.what == LOST), default=None)

    # ---- what is kept in files ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Between two local steps, at which nobody is still to launch a mean that others have launched."""
        return {
            "present": list(self.present),
            "generation": self.generation,
            "made": list(self._made),
            "not_before_s": self._not_before_s,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Of a new one, with the same churn."""
        self.present = list(saved["present"])
        self.generation = saved["generation"]
        self._not_before_s = saved["not_before_s"]
        self._made = list(saved["made"])
        for worker, made in enumerate(self._made):
            while len(self._changes[worker]) < made:
                self._hear()
        for mine, made in zip(self._changes, self._made, strict=True):
            for _ in range(made):
                mine.popleft()


def _nbytes(state: dict[str, Any]) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, Tensor))


def _take_part(group: ThreadGroup, rank: int, launch: Launch) -> None:
    """In a thread of its own: others of this mean wait for it."""
    workers = Among(group, rank)
    given = launch.handle.caught_up
    try:
        if given is None:
            launch.mean(workers, launch.buffer, _NEVER_S)
        else:
            launch.handle.buffer = launch.member.listen(given, workers)
    except RuntimeError:
        group.end()
        if group.failure is None:
            raise


@final
class ThreadGroup:
    """The collectives that one mean is made of, of threads that wait for each other.

    Args:
        size: of so many workers.
        start_s: when the first begins.
        fabric: says what they cost.
        loss: asked whether a worker is lost until a time.

    Attributes:
        ends_s: when the last has ended.
        failure: why the mean will never come.
    """

    def __init__(
        self, size: int, start_s: float, fabric: Fabric, loss: Callable[[float], Change | None]
    ) -> None:
        self.size = size
        self.ends_s = start_s
        self.failure: MeanLost | None = None
        self._fabric = fabric
        self._loss = loss
        self._brought: list[Any] = [None] * size
        self._move: Callable[[list[Any]], float] = average
        self._share = 1.0
        self._barrier = threading.Barrier(size, action=self._act, timeout=_NEVER_S)

    def bring(
        self, rank: int, brought: Any, move: Callable[[list[Any]], float], share: float = 1.0
    ) -> None:
        """Wait until all have, and what they have brought has been moved.

        Raises:
            RuntimeError: a worker was lost meanwhile.
        """
        self._brought[rank] = brought
        self._move = move
        self._share = share
        self._barrier.wait()

    def end(self) -> None:
        """One of the threads will not come any more."""
        self._barrier.abort()

    def _act(self) -> None:
        nbytes = self._move(list(self._brought))
        ends_s = self.ends_s + self._share * self._fabric.cost_s(nbytes, self.size)
        lost = self._loss(ends_s)
        if lost is not None:
            self.ends_s = max(self.ends_s, lost.seconds)
            self.failure = MeanLost(f"worker {lost.worker} was lost at {lost.seconds:g} s")
            raise self.failure
        self.ends_s = ends_s


@final
class Among(Communicator):
    """One worker's part in a mean, from its thread."""

    in_lockstep = True

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self.rank = rank
        self.size = group.size
        self._group = group

    def all_reduce(self, buffer: Tensor) -> Handle:
        """There at once, as all of these are."""
        self._group.bring(self.rank, buffer, average)
        return FinishedHandle(buffer)

    def all_gather(self, output: Tensor, input: Tensor, *, after: Handle | None = None) -> Handle:
        """See `VirtualCommunicator.all_gather`; in the order of the calls."""
        if after is None:
            self._group.bring(self.rank, (input, output), lambda brought: gather(brought) / 2)
        else:
            self._group.bring(self.rank, (input, output), gather, 0.5)
        return FinishedHandle(output)

    def all_to_all(self, output: Tensor, input: Tensor) -> Handle:
        """Half of an all-reduce."""
        self._group.bring(self.rank, (input, output), swap, 0.5)
        return FinishedHandle(output)

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """No part of a mean."""
        raise NotImplementedError

    def all_gather_json(self, message: object, *, what: str = "") -> list[object]:
        """No part of a mean."""
        raise NotImplementedError


@final
class VirtualElastic(Communicator):
    """A worker of a `Membership`.

    Args:
        membership: who is there.
        worker: its number.
        joins: whether it has just come.
    """

    in_lockstep = True
    elastic = True

    def __init__(self, membership: Membership, worker: int, *, joins: bool) -> None:
        self.worker = worker
        self.joins = joins
        self.rank = worker
        self.size = membership.fabric.workers
        self._membership = membership
        self._member: Member | None = None
        self._broadcasts = 0
        self._count = 0

    def attach(self, member: Member) -> None:
        """Send means for this one."""
        self._member = member

    @property
    def carries_codes(self) -> bool:
        """As `Among` does."""
        return True

    def now(self) -> float:
        """The worker's virtual clock."""
        return self._membership.fabric.clocks[self.worker]

    def all_reduce(self, buffer: Tensor) -> Handle:
        """Of whoever is there."""
        return self.all_reduce_by(buffer, _mean)

    def all_reduce_by(self, buffer: Tensor, mean: MakeMean) -> Handle:
        """The same, of a mean that `mean` makes."""
        assert self._member is not None
        return self._membership.arrive(self, self._member, buffer, mean)

    def taken_part(self, rank: int, size: int) -> None:
        """In a mean, as the one of this rank among so many."""
        self.rank = rank
        self.size = size
        self.joins = False
        self._count += 1

    def be_at(self, rank: int, size: int) -> None:
        """Where it was when it was saved."""
        self.rank = rank
        self.size = size

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """Among those that begin; see `VirtualCommunicator.broadcast`."""
        self._membership.fabric.broadcast(self.worker, self._broadcasts, buffer)
        self._broadcasts += 1

    def all_gather_json(self, message: object, *, what: str = "") -> list[object]:
        """The own message for everybody's: workers of one process agree by construction."""
        return [json.loads(json.dumps(message)) for _ in range(self.size)]

    def state_dict(self) -> dict[str, Any]:
        """As `Elastic` has it; there is but one history."""
        return {"name": str(self.worker), "history": "", "count": self._count, "events": []}

    def load_state_dict(self, saved: dict[str, Any]) -> bool:
        """The whole cluster goes back to where it was."""
        self._count = saved["count"]
        return True


def _mean(workers: Communicator, buffer: Tensor, timeout_s: float) -> None:
    workers.all_reduce(buffer).wait(timeout_s)
