"""Membership that changes: torchft's lighthouse says who is alive, gloo groups move the bytes.

One thread does, for one mean after the other: ask the lighthouse who is there, make a new group if those
are not the ones of before, let who is behind catch up, all-reduce. Nothing of it happens in the training
thread, and since it is one mean after the other, nothing else is on its way when groups change.

Who is behind is decided by a history, a hash that every mean continues, and not by counts: two halves of
a network that were cut apart may each have made five means, and then have different anchors.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, final

import torch
from torch import Tensor

from distoptim import checks
from distoptim.comm.communicator import (
    CommunicationError,
    Communicator,
    MeanLost,
    Member,
    SingleWorker,
)
from distoptim.comm.generation import Generation, Store, digest, see_alive
from distoptim.comm.handles import CatchUp, Handle, TimedHandle
from distoptim.comm.lighthouse import PAUSE_S, Asked, Lighthouse, Said, furthest
from distoptim.comm.roll import Event, Roll

# A new lighthouse, which knows nobody, tells the first who ask of too few: so long ask again.
_NEW_LIGHTHOUSE_S = 5.0
# Who has just come is alive to a lighthouse by its questions alone, so that it must ask again; a run may
# take longer to its next mean than a lighthouse waits to take it for dead.
_PATIENCE_S = 1.0
# One that ends tells those that have just come, which ask so often, for so long.
_TELL_S = 6.0
# By number, as they are exchanged in a group; 0: it stays.
_FAREWELLS = ("", "leave", "end")
# So many histories are remembered, of means that others may have lost.
_REMEMBERED = 100


@final
class ElasticHandle(TimedHandle):
    """A mean that other workers may drop out of on its way.

    Args:
        buffer: to be averaged, in place.
        position: where this worker was when it launched it.
        mean: makes it; told the workers, the buffer, and the bound of each wait.
        taken: how many catch-ups this worker had taken over when it launched it.
        take: called when it was waited for and has brought what this worker was behind by.
    """

    def __init__(
        self,
        buffer: Tensor,
        position: dict[str, Any],
        *,
        mean: Callable[[Communicator, Tensor, float], None],
        taken: int,
        take: Callable[[], None],
    ) -> None:
        super().__init__(buffer, now=time.perf_counter())
        self.position = position
        self.mean = mean
        self.taken = taken
        # That it continues, once it is there: who has merged the means of one history up to it holds the same.
        self.history = ""
        self._take = take
        self._taken = False
        self._over = threading.Event()
        self._failure: CommunicationError | None = None

    def end(self, failure: CommunicationError | None = None) -> None:
        """It is there, or never will be."""
        self._failure = failure
        self._over.set()

    @property
    def is_there(self) -> bool:
        """Whether the mean is there."""
        return self._over.is_set() and self._failure is None

    def poll(self) -> None:
        """Note whether the communication thread is done with it."""
        self.look(self._over.is_set())

    def _wait(self, timeout_s: float) -> None:
        # Without a limit of its own: every wait in the thread has one, but for a lighthouse that is
        # away and for workers that are too few, for which it waits until they are back.
        while not self._over.wait(1.0):
            pass
        if self._failure is not None:
            raise self._failure
        if self.caught_up is not None and not self._taken:
            self._taken = True
            self._take()


@final
class MeanThread:
    """Makes one mean after the other, in a thread of its own, with whoever is there.

    Args:
        lighthouse: says who is there.
        store: where others meet this worker.
        roll: is told who takes part.
        min_workers: a mean waits for as many.
        timeout_s: bound of a collective, in seconds.

    Attributes:
        member: for whom.
        history, count: of the means so far.
        joins: whether this worker has still to take over what the others share.
        rank, size: among those of the last mean.
    """

    def __init__(
        self,
        lighthouse: Lighthouse,
        store: Store,
        roll: Roll,
        *,
        min_workers: int,
        timeout_s: float,
    ) -> None:
        self.member: Member | None = None
        self.history = ""
        self.count = 0
        self.joins = False
        self.rank = 0
        self.size = 1
        self.group: Generation | None = None
        self._lighthouse = lighthouse
        self._store = store
        self._roll = roll
        self._min_workers = min_workers
        self._timeout_s = timeout_s
        self._launches: queue.SimpleQueue[ElasticHandle | None] = queue.SimpleQueue()
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._farewell = "leave"
        self._says_goodbye = False
        # Of what a mean was lost last.
        self._failed = ""
        # Those that have said goodbye, whom the lighthouse would wait for: until it has forgotten them the
        # members are those of the last mean, and nobody asks.
        self._leaving: list[str] = []
        # Catch-ups that were made here.
        self._given = 0
        # By count, the last histories; and of means that were lost here, what they would have been.
        self._histories: dict[int, str] = {}
        self._unheard: dict[str, int] = {}

    # ---- from the training thread -----------------------------------------------------------------

    def start(self, member: Member) -> None:
        """Be alive to the lighthouse, and make what is launched for this one."""
        self.member = member
        if not self._threads:
            beat = threading.Thread(
                target=self._lighthouse.beat, args=[self._over], name="distoptim beat", daemon=True
            )
            means = threading.Thread(target=self._run, name="distoptim means", daemon=True)
            self._threads = [beat, means]
            for thread in self._threads:
                thread.start()

    def launch(self, handle: ElasticHandle) -> None:
        """Make it after those that were launched before."""
        self._launches.put(handle)

    @property
    def is_over(self) -> bool:
        """Whether this worker has left."""
        return self._over.is_set()

    def end(self, farewell: str) -> None:
        """Make what was launched, say goodbye and leave."""
        if self._over.is_set():
            return
        self._farewell = farewell
        self._launches.put(None)
        for thread in self._threads[1:]:
            thread.join(self._timeout_s)
        self._over.set()
        self.leave_group()

    @property
    def workers(self) -> Communicator:
        """Those of the present group."""
        return SingleWorker() if self.group is None else self.group.workers

    def resume(self, history: str, count: int) -> None:
        """Be as far as a file is."""
        self.history = history
        self.count = count

    # ---- one mean after the other -----------------------------------------------------------------

    def _run(self) -> None:
        while (launch := self._launches.get()) is not None:
            self._answer(launch)
        self._says_goodbye = True
        if self.history and not self.joins:
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        """Tell the others at their next launch, which do not ask while the lighthouse remembers another one."""
        if not self._leaving:
            self._tell_who_asks(self._timeout_s)
            return
        stay = 0
        with contextlib.suppress(RuntimeError, OSError):
            _, leaving = self._exchange()
            stay = self.size - len(leaving)
        self.leave_group()
        if not stay and self._farewell == "end":
            # Nobody is left who could tell those that have just come.
            self._tell_who_asks(_TELL_S)

    def _tell_who_asks(self, limit_s: float) -> None:
        """Those that have just come, and ask again and again, may need to hear it twice."""
        for limit in (limit_s, _TELL_S, _TELL_S):
            there = self.ask(self._farewell, {}, limit) or []
            if self._farewell == "leave" or not any(w.said.phase == "look" for w in there):
                return

    def _answer(self, launch: ElasticHandle) -> None:
        try:
            if launch.taken != self._given:
                raise MeanLost(f"{self._roll.name}: launched before it had caught up")
            self._mean(launch)
        except CommunicationError as error:
            launch.end(error)
        except BaseException as error:  # noqa: BLE001  # the training thread waits: it must hear of any
            launch.end(CommunicationError(f"{self._roll.name}: {type(error).__name__}: {error}"))

    def _mean(self, launch: ElasticHandle) -> None:
        """Ask, regroup, let who is behind catch up, all-reduce.

        Raises:
            MeanLost: a worker was lost on its way.
        """
        before = (self.history, self.count)
        try:
            if not self._is_settled():
                before = self._regroup(launch)
            self._all_reduce(launch, before)
        except (RuntimeError, OSError) as error:
            # At once: others of the group wait for this worker as long as it holds it, and who goes on
            # without asking finds out by it. It hears of nothing while anybody holds the group, as the
            # exception's frames do.
            traceback.clear_frames(error.__traceback__)
            self.leave_group()
            if isinstance(error, CommunicationError):
                raise
            self._failed = str(error).splitlines()[0]
            self._roll.note("mean lost", self._roll.name, self._failed)
            raise MeanLost(f"{self._roll.name}: a mean is lost: {error}") from error
        self._note_made(*before)
        launch.history = self.history
        launch.workers = self.size
        if launch.caught_up is not None:
            self._given += 1
        launch.end()
        if launch.caught_up is not None and self.member is not None:
            self.member.hurry(launch)

    def _note_made(self, history: str, count: int) -> None:
        assert self.group is not None
        self.count = count + 1
        self.history = digest(history, self.group.key, str(self.count))
        self._histories[self.count] = self.history
        self._histories.pop(self.count - _REMEMBERED, None)
        self._unheard.clear()
        self.joins = False
        self._failed = ""

    def _is_settled(self) -> bool:
        """Whether all go on with the last mean's members, since the lighthouse would wait for one that has left.

        But for those of them that leave now.
        """
        if not self._leaving or self.joins:
            return False
        waits, leaving = self._exchange()
        if leaving:
            assert self.group is not None
            going = {w.life for w in leaving}
            known = [*self._leaving, *going]
            members = [w for w in self.group.members if w.life not in going]
            self._roll.goodbyes.update({w.name: w for w in leaving})
            self.form(members, meet=members[0])
            self._leaving = known
            return True
        if not waits:
            self._leaving = []
        return waits

    def _exchange(self) -> tuple[bool, list[Asked]]:
        """Whether the lighthouse would wait, as the first of them has seen; and who of the members leaves now."""
        assert self.group is not None
        goes = _FAREWELLS.index(self._farewell) if self._says_goodbye else 0
        own = torch.tensor([0.0, float(goes)])
        if self.rank == 0:
            # One of them asks for all, so that all leave off together.
            own[0] = self._lighthouse.remembers(self._leaving)
        everybody = torch.zeros(self.size, 2)
        self.workers.all_gather(everybody, own).wait(self._timeout_s)
        leaving = [
            replace(w, said=Said(_FAREWELLS[int(row[1])], w.said.history, self.count))
            for w, row in zip(self.group.members, everybody, strict=True)
            if row[1]
        ]
        return bool(everybody[0, 0]), leaving

    def _regroup(self, launch: ElasticHandle) -> tuple[str, int]:
        """Ask, have the group, let who is behind catch up; history and count of those that are right."""
        members, leaving = self._members(launch.position)
        leading = furthest(members)
        if not leading:
            hear_of_the_end(self._roll, self._roll.goodbyes.values())
            raise CommunicationError(
                f"{self._roll.name}: nobody is left of the run that it was to join"
            )
        self.form(members, meet=leading[0])
        self._leaving = [w.life for w in leaving]
        first = leading[0]
        behind = [w for w in members if w.said.history != first.said.history]
        if behind:
            self._catch_up(launch, members, first, behind)
        return first.said.history, first.said.count

    def _members(self, position: dict[str, Any]) -> tuple[list[Asked], list[Asked]]:
        """Who takes part in the next mean, by name, and who leaves; waits until there are enough.

        Raises:
            MeanLost: the others have given this launch up, of which this worker had not heard.
        """
        too_few_until = None
        was_told = False
        while not self._over.is_set():
            before = self._lighthouse.quorum
            there = self.ask("round", position, self._timeout_s) or []
            launched = sorted((w for w in there if w.said.phase == "round"), key=lambda w: w.name)
            late = _late(launched)
            if any(w.life == self._lighthouse.life for w in late):
                raise MeanLost(f"{self._roll.name}: the others are a launch further")
            on_time = [w for w in launched if w not in late]
            leading = furthest(on_time)
            together = _in_one_call(leading)
            elsewhere = [w for w in leading if w not in together]
            # Who is behind takes over what a round's mean has, and waits while the others are in another call.
            in_a_round = not leading or together[0].said.position["round"]
            members = [w for w in on_time if w not in elsewhere] if in_a_round else together
            if any(w.life == self._lighthouse.life for w in elsewhere) and not was_told:
                was_told = True
                others = together[0].said.position["what"]
                self._roll.note(
                    "left out", self._roll.name, f"in {position['what']}, the others in {others}"
                )
            leaving = {w.name: w for w in there if w.said.phase in ("leave", "end")}
            self._roll.goodbyes.update(leaving)
            missing = set(self._roll.names) - {w.name for w in members} - leaving.keys()
            if there and self._lighthouse.quorum < before and missing:
                too_few_until = time.monotonic() + _NEW_LIGHTHOUSE_S
            waits = too_few_until is not None and missing and time.monotonic() < too_few_until
            enough = len(on_time) >= self._min_workers
            if enough and not waits and any(w.life == self._lighthouse.life for w in members):
                return members, list(leaving.values())
            time.sleep(PAUSE_S)
        raise CommunicationError(f"{self._roll.name}: this communicator has been closed")

    def ask(self, phase: str, position: dict[str, Any], limit_s: float) -> list[Asked] | None:
        """Who asks now; None if the lighthouse does not answer."""
        holds = "" if self.group is None else self.group.key
        said = Said(phase, self.history, self.count, position, holds)
        return self._lighthouse.ask(said, limit_s)

    def form(self, members: Sequence[Asked], meet: Asked) -> None:
        """Have the group of these members: the one of before, if all have it still."""
        if self.group is not None and self.group.is_of(members):
            return
        self.leave_group()
        self._roll.call(members, joins=self.joins, failed=self._failed)
        group = Generation(members, self._lighthouse.life, self._store, meet)
        self.rank = group.rank
        self.size = len(members)
        self.group = group

    def _catch_up(
        self,
        launch: ElasticHandle,
        members: Sequence[Asked],
        giver: Asked,
        behind: Sequence[Asked],
    ) -> None:
        """One that is not behind gives what all share; who is behind sends nothing in this mean."""
        assert self.group is not None
        own = members[self.group.rank]
        if own is giver:
            assert self.member is not None
            self.group.give({"state": self.member.give(), "histories": self._histories}, behind)
        elif own in behind:
            given = self.group.receive(giver)
            self._histories = given["histories"]
            heard = {self._unheard[h] for h in self._histories.values() if h in self._unheard}
            launch.caught_up = CatchUp(giver.said.position, given["state"], frozenset(heard))
            missed = giver.said.count - self.count
            behind_by = f"{missed} means" if missed > 0 else "another history"
            if not self.joins:
                self._roll.note("caught up", self._roll.name, f"{behind_by} behind {giver.name}")

    def _all_reduce(self, launch: ElasticHandle, before: tuple[str, int]) -> None:
        assert self.group is not None
        if launch.caught_up is not None:
            assert self.member is not None
            launch.buffer = self.member.listen(launch.caught_up, self.workers)
            return
        history, count = before
        # Until it is here: it may be lost here alone.
        self._unheard[digest(history, self.group.key, str(count + 1))] = launch.position["fragment"]
        launch.mean(self.workers, launch.buffer, self._timeout_s)

    def leave_group(self) -> None:
        """Abort what is on its way in it."""
        group = self.group
        self.group = None
        # Who has none must ask who is there.
        self._leaving = []
        if group is not None:
            group.leave()


def hear_of_the_end(roll: Roll, there: Any) -> None:
    """See that a worker has not come after the end of the run.

    Raises:
        CommunicationError: it has.
    """
    for other in there:
        if other.said.phase == "end":
            raise CommunicationError(
                f"{roll.name}: the run has ended, after {other.said.count} means, as {other.name} says; "
                "to begin another one wait until all of it have closed"
            )


def _late(workers: Sequence[Asked]) -> list[Asked]:
    """Of those of the longest history, whose last launch is one that others have given up."""
    leading = furthest(workers)
    sent = [w.said.position["messages"] for w in leading]
    return [w for w, number in zip(leading, sent, strict=True) if number < max(sent)]


def _in_one_call(leading: Sequence[Asked]) -> list[Asked]:
    """Of those that are not behind the most that are in the same call at the same local step.

    One that has caught up may have missed a call that a loop makes at a certain local step, over which it went.
    It waits until the others have made it, is behind then, and takes over what they share.
    """
    calls: dict[str, list[Asked]] = {}
    for worker in leading:
        calls.setdefault(str(worker.said.position["code"]), []).append(worker)
    # Of as many, those with the first name: all choose the same.
    return max(calls.values(), key=len, default=[])


@final
class Elastic(Communicator):
    """Workers that come and go: means go on with those that are there.

    Every launch asks the lighthouse (`distoptim lighthouse`) who is alive. Who is lost is missed by the
    next mean, at the latest after the lighthouse's heartbeat timeout; who comes, or comes back, takes
    over what the others share and counts from the next round on. A mean that is on its way when a worker
    is lost may be lost with it: its local steps stay in x.

    Needs `pip install 'distoptim[elastic]'`. Beside it `levels`, `join()`, meshes, `EqualTime`, and several
    fragments without an anchor or with a tau that changes, are refused.

    Args:
        lighthouse: "HOST:PORT" at which `distoptim lighthouse` listens.
        name: of this worker; no two living ones have the same. One that is restarted keeps it.
        start: so many workers begin a run; who comes later joins it.
        min_workers: with fewer, those that are left wait until others come.
        host: the address of this machine at which other workers reach it; what listens, listens there
            alone. 127.0.0.1 by default, since no other is known to be meant.
        timeout_s: bound of one collective, in seconds: so long a worker that stands still is waited for.
        join_timeout_s: how long to wait for a run to join, or for `start` workers, in seconds.

    Attributes:
        name: of this worker.
        members: names of the workers in the last mean, sorted.
        generation: how often the members have changed, as this worker has seen it.
        events: what has happened so far: who came, left, or was lost, and what this worker missed; also
            logged by "distoptim" at level INFO, a line each.

    Raises:
        ValueError: a value outside its range, or another living worker of that name.
        CommunicationError: no lighthouse, no run and too few workers within `join_timeout_s`.
    """

    elastic = True

    def __init__(
        self,
        lighthouse: str,
        *,
        name: str,
        start: int = 1,
        min_workers: int = 1,
        host: str = "127.0.0.1",
        timeout_s: float = 60.0,
        join_timeout_s: float = 600.0,
    ) -> None:
        checks.address("lighthouse", lighthouse)
        if not isinstance(name, str) or not name:
            raise ValueError(f"name={name!r}: allowed is text, another one for each worker")
        self.name = name
        self.host = host
        self.start = checks.integer("start", start, 1)
        self.min_workers = checks.integer("min_workers", min_workers, 1)
        self.timeout_s = checks.number("timeout_s", timeout_s, 1e-3, 1e9)
        self.join_timeout_s = checks.number("join_timeout_s", join_timeout_s, 1e-3, 1e9)
        self._store = Store(host, self.timeout_s)
        self._roll = Roll(name)
        self._lighthouse = Lighthouse(
            lighthouse,
            name=name,
            store=self._store.address,
            timeout_s=self.timeout_s,
            join_timeout_s=self.join_timeout_s,
        )
        self._means = MeanThread(
            self._lighthouse,
            self._store,
            self._roll,
            min_workers=self.min_workers,
            timeout_s=self.timeout_s,
        )
        # Before it has found the others: as many as it knows of.
        self._means.size = self.start
        # Catch-ups that the training thread has taken over.
        self._taken = 0
        # An interpreter that ends with a collective under way aborts.
        atexit.register(self.leave)

    @property
    def members(self) -> list[str]:
        """Names of the workers in the last mean, sorted."""
        return self._roll.names

    @property
    def generation(self) -> int:
        """How often the members have changed, as this worker has seen it."""
        return self._roll.generation

    @property
    def events(self) -> list[Event]:
        """What has happened so far."""
        return self._roll.events

    @property
    def history(self) -> str:
        """Of the means so far, equal on those that have made the same; "" before the run."""
        return self._means.history

    @property
    def count(self) -> int:
        """Of the means so far."""
        return self._means.count

    # ---- what an optimizer asks -------------------------------------------------------------------

    @property
    def rank(self) -> int:  # type: ignore[override]  # of which there is another one after each change
        """Among the members, by name."""
        return self._means.rank

    @property
    def size(self) -> int:  # type: ignore[override]  # as above
        """The number of members."""
        return self._means.size

    @property
    def joins(self) -> bool:  # type: ignore[override]  # as above
        """Whether this worker has still to take over what the others share."""
        return self._means.joins

    def all_reduce(self, buffer: Tensor) -> Handle:
        """Start the mean over whoever is there; see `ElasticHandle`."""
        return self.all_reduce_by(buffer, _mean)

    def all_reduce_by(
        self, buffer: Tensor, mean: Callable[[Communicator, Tensor, float], None]
    ) -> Handle:
        """The same, of a mean that `mean` makes in the communication thread."""
        if self._means.is_over:
            raise CommunicationError("this communicator has been closed")
        assert self._means.member is not None
        handle = ElasticHandle(
            buffer,
            self._means.member.position(buffer),
            mean=mean,
            taken=self._taken,
            take=self._take,
        )
        self._means.launch(handle)
        return handle

    def _take(self) -> None:
        self._taken += 1

    @property
    def carries_codes(self) -> bool:
        """Those of a mean go over its own group."""
        return True

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """Among those that begin a run together; to one that joins it comes with its first mean."""
        if self._means.member is None:
            self._means.workers.broadcast(buffer, source)

    def all_gather_json(self, message: object, *, what: str = "") -> list[object]:
        """Everybody's among those that begin a run together.

        Raises:
            CommunicationError: later: what then goes on beside means nobody else need be in.
        """
        if self._means.member is not None:
            raise CommunicationError(
                f"{self.name}: {what or 'a message'} beside workers that come and go"
            )
        return self._means.workers.all_gather_json(message, what=what)

    def tally(self) -> dict[str, float]:
        """How many workers came, were lost, and left."""
        return self._roll.tally()

    # ---- the begin and the end --------------------------------------------------------------------

    def enter(self, facts: object, *, what: str) -> list[object]:
        """Begin a run with `start` workers, or join the one that there is; blocks until then.

        Args:
            facts: what must be equal on all workers, as JSON.
            what: the call that asks.

        Returns: the facts of a worker of the run that is joined, and the own; or those of all that begin.

        Raises:
            CommunicationError: neither within `join_timeout_s`, or the run has just ended.
            ValueError: a living worker has this name.
        """
        self._store.tell("facts", json.dumps(facts))
        deadline = time.monotonic() + self.join_timeout_s
        found = 0
        while (left := deadline - time.monotonic()) > 0:
            there = self._means.ask("look", {}, min(left, _PATIENCE_S))
            if there is None:
                continue
            if self._has_double(there):
                time.sleep(PAUSE_S)
                continue
            # One that says goodbye is no run to join.
            if running := furthest([w for w in there if w.said.phase == "round"]):
                self._means.joins = True
                theirs = self._store.of(running[0]).get("facts")
                return [json.loads(theirs), json.loads(json.dumps(facts))]
            hear_of_the_end(self._roll, there)
            new = sorted((w for w in there if w.said.phase == "look"), key=lambda w: w.name)
            found = len(new)
            if found >= self.start:
                return self._begin(new, facts, what)
            time.sleep(PAUSE_S)
        raise CommunicationError(
            f"{self.name}: no run to join, and {found} of {self.start} workers, within "
            f"{self.join_timeout_s:g} s (join_timeout_s)"
        )

    def _has_double(self, there: Sequence[Asked]) -> bool:
        """Whether one of this name is there that has died; the lighthouse names it for a heartbeat more.

        Raises:
            ValueError: it lives.
        """
        for other in there:
            if other.name == self.name and other.life != self._lighthouse.life:
                try:
                    see_alive(other)
                except OSError:
                    return True
                raise ValueError(
                    f"name={self.name!r}: a living worker has it; allowed is one that no other has"
                )
        return False

    def _begin(self, workers: Sequence[Asked], facts: object, what: str) -> list[object]:
        """Make the first group.

        Raises:
            CommunicationError: one of them is gone.
        """
        try:
            self._means.form(workers, meet=workers[0])
            assert self._means.group is not None
            self._means.resume(digest("", self._means.group.key, "0"), 0)
            return self.all_gather_json(facts, what=what)
        except (RuntimeError, OSError) as error:
            # As in a mean: nobody else hears of it while this worker holds the group.
            traceback.clear_frames(error.__traceback__)
            self._means.leave_group()
            self._means.resume("", 0)
            if isinstance(error, CommunicationError):
                raise
            raise CommunicationError(
                f"{self.name}: a worker is gone with which the run was to begin ({error}); start again"
            ) from error

    def attach(self, member: Member) -> None:
        """Take part from here on: be alive to the lighthouse, and make what `all_reduce` launches."""
        self._means.start(member)

    def close(self) -> None:
        """Say goodbye at the others' next launch, and leave. Twice is fine.

        The run is over then, as who comes meanwhile is told. While an exception passes (a SystemExit, too,
        that a handler of SIGTERM raises), and where a program ends without close(), this worker leaves in
        the middle, and may come back.
        """
        self._go("end" if sys.exc_info()[0] is None else "leave")

    def leave(self) -> None:
        """Say goodbye in the middle of the run, which goes on; this worker may come back. Twice is fine."""
        self._go("leave")

    def _go(self, farewell: str) -> None:
        self._means.end(farewell)
        atexit.unregister(self.leave)

    # ---- what is kept in files ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Whose it is, how far the run is, and what has happened in it; while nothing is in flight."""
        return {
            "name": self.name,
            "history": self.history,
            "count": self.count,
            "events": [asdict(event) for event in self.events],
        }

    def load_state_dict(self, saved: dict[str, Any]) -> bool:
        """Be as far as a file is; returns False, and changes nothing but events, where the run is further.

        The others, if they are not as far, catch up at the next mean.
        """
        self.events[:0] = [Event(**event) for event in saved["events"]]
        if saved["count"] <= self.count:
            return False
        self._means.resume(saved["history"], saved["count"])
        self._roll.note("goes on", self.name, f"from its file, after {self.count} means")
        return True


def _mean(workers: Communicator, buffer: Tensor, timeout_s: float) -> None:
    workers.all_reduce(buffer).wait(timeout_s)
