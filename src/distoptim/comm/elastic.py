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
import hashlib
import io
import json
import logging
import queue
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, cast, final

import torch
import torch.distributed as dist
from torch import Tensor

from distoptim import checks
from distoptim.comm import control
from distoptim.comm.communicator import (
    CommunicationError,
    Communicator,
    MeanLost,
    Member,
    SingleWorker,
    unlike_calls,
)
from distoptim.comm.handles import CatchUp, Handle, TimedHandle, WorkHandle

logger = logging.getLogger("distoptim")

# torch types neither the stores nor a backend's options.
_dist: Any = dist
# Far below any timeout at which a lighthouse takes a worker for dead.
_HEARTBEAT_S = 0.2
# So long after one that said goodbye the lighthouse may still count it among the living, and wait for it.
_FORGOTTEN_S = 6.0
# A new lighthouse, which knows nobody, tells the first who ask of too few: so long ask again.
_NEW_LIGHTHOUSE_S = 5.0
# Between questions to a lighthouse that is away, or that knows too few workers.
_PAUSE_S = 0.2
# Who has just come is alive to a lighthouse by its questions alone, so that it must ask again; a run may
# take longer to its next mean than a lighthouse waits to take it for dead.
_PATIENCE_S = 1.0
# While a group is built nobody hears of a death but by asking: so often, and connecting takes at most so long.
_LOOK_S = 0.02
_CONNECT_S = 5.0
# One that leaves a group waits so long first, until the last mean is there on the others too.
_LAST_S = 0.2


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
@dataclass(frozen=True)
class Event:
    """Something that has happened to the members of a run, as one of them has seen it.

    Attributes:
        time: when, in seconds since 1970.
        what: "begins", "joined", "left", "ended", "lost" (a worker); "goes on", "mean lost" or "caught up"
            (this one's).
        worker: its name.
        why: in words.
    """

    time: float
    what: str
    worker: str
    why: str


@final
@dataclass(frozen=True)
class _Asked:
    """A worker as the lighthouse tells of it.

    Attributes:
        phase: "round", it has launched a mean; "look", it has just come; "leave", it is going; "end", the
            run is over for it.
        history: of its means; "" before the first.
        count: of its means.
        position: where it was at the launch.
        every_s: from one launch of its to the next.
        holds: the group that it has.
        asked: how often it has asked.
    """

    name: str
    life: str
    store: str
    phase: str
    history: str
    count: int
    position: dict[str, Any]
    every_s: float
    holds: str
    asked: int


@final
@dataclass
class _Group:
    """The members of a generation, in the order of their names.

    Attributes:
        key: its name, unlike that of any other.
        lives: of its members.
        work: their process group; None for one that is alone.
        workers: who means are made among.
    """

    key: str = ""
    lives: tuple[str, ...] = ()
    work: Any = None
    workers: Communicator = field(default_factory=SingleWorker)


@final
class _Among(Communicator):
    """The collectives of one group, from the communication thread."""

    def __init__(self, work: Any, rank: int, size: int, timeout_s: float) -> None:
        self.rank = rank
        self.size = size
        self._work = work
        self._timeout_s = timeout_s

    def all_reduce(self, buffer: Tensor) -> Handle:
        """The mean; gloo has the sum."""
        return WorkHandle(self._work.allreduce([buffer]), buffer, self.size)

    def all_gather(self, output: Tensor, input: Tensor, *, after: Handle | None = None) -> Handle:
        """On the one connection there is: one mean is made after the other."""
        return WorkHandle(self._work.allgather([list(output.unbind(0))], [input]), output)

    def all_to_all(self, output: Tensor, input: Tensor) -> Handle:
        """Rows."""
        return WorkHandle(self._work.alltoall_base(output, input, [], []), output)

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """Blocks."""
        self._work.broadcast(buffer, source).wait(timedelta(seconds=self._timeout_s))

    def all_gather_json(self, message: object, *, what: str = "") -> list[object]:
        """Blocks."""
        return control.all_gather_json(message, self._work, what=what)


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
    generation = 0
    rank = 0
    history = ""
    count = 0
    _farewell = "leave"

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
        self.timeout_s = checks.number("timeout_s", timeout_s, 1e-3, 1e9)
        self.join_timeout_s = checks.number("join_timeout_s", join_timeout_s, 1e-3, 1e9)
        self.start = checks.integer("start", start, 1)
        self.min_workers = checks.integer("min_workers", min_workers, 1)
        self.host = host
        self.members: list[str] = [name]
        self.events: list[Event] = []
        # Before it has found the others: as many as it knows of.
        self.size = self.start
        self._address = f"http://{lighthouse}"
        self._life = uuid.uuid4().hex
        self._member: Member | None = None
        self._group = _Group()
        # Of the members, and of those that have said goodbye; and what a mean was lost of last.
        self._lives: dict[str, str] = {}
        self._goodbyes: dict[str, _Asked] = {}
        self._failed = ""
        self._asked = 0
        self._quorum = 0
        # Launches for which the members are those of the last one, and nobody asks.
        self._unasked = 0
        # Catch-ups: made here, and taken over by the training thread.
        self._given = 0
        self._taken = 0
        self._launched_s = 0.0
        self._every_s = 0.0
        self._launches: queue.SimpleQueue[ElasticHandle | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._store, self._store_address = _own_store(host, self.timeout_s)
        self._client = self._connect()
        # An interpreter that ends with a collective under way aborts.
        atexit.register(self.leave)

    # ---- what an optimizer asks -------------------------------------------------------------------

    def all_reduce(self, buffer: Tensor) -> Handle:
        """Start the mean over whoever is there; see `ElasticHandle`."""
        return self.all_reduce_by(buffer, _mean)

    def all_reduce_by(
        self, buffer: Tensor, mean: Callable[[Communicator, Tensor, float], None]
    ) -> Handle:
        """The same, of a mean that `mean` makes in the communication thread."""
        if self._closed.is_set():
            raise CommunicationError("this communicator has been closed")
        assert self._member is not None
        handle = ElasticHandle(
            buffer,
            self._member.position(buffer),
            mean=mean,
            taken=self._taken,
            take=self._take,
        )
        self._launches.put(handle)
        return handle

    def _take(self) -> None:
        self._taken += 1

    @property
    def carries_codes(self) -> bool:
        """Those of a mean go over its own group."""
        return True

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """Among those that begin a run together; to one that joins it comes with its first mean."""
        if self._member is None:
            self._group.workers.broadcast(buffer, source)

    def all_gather_json(self, message: object, *, what: str = "") -> list[object]:
        """Everybody's among those that begin a run together.

        Raises:
            CommunicationError: later: what then goes on beside means nobody else need be in.
        """
        if self._member is not None:
            raise CommunicationError(
                f"{self.name}: {what or 'a message'} beside workers that come and go"
            )
        return self._group.workers.all_gather_json(message, what=what)

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
        self._store.set("facts", json.dumps(facts))
        deadline = time.monotonic() + self.join_timeout_s
        found = 0
        while (left := deadline - time.monotonic()) > 0:
            there = self._ask("look", {}, min(left, _PATIENCE_S))
            if there is None:
                continue
            if self._has_double(there):
                time.sleep(_PAUSE_S)
                continue
            # One that says goodbye is no run to join.
            if running := _furthest([w for w in there if w.phase == "round"]):
                self.joins = True
                theirs = _client_of(running[0].store, self.timeout_s).get("facts")
                return [json.loads(theirs), json.loads(json.dumps(facts))]
            self._hear_of_the_end(there)
            new = sorted((w for w in there if w.phase == "look"), key=lambda w: w.name)
            found = len(new)
            if found >= self.start:
                return self._begin(new, facts, what)
            time.sleep(_PAUSE_S)
        raise CommunicationError(
            f"{self.name}: no run to join, and {found} of {self.start} workers, within "
            f"{self.join_timeout_s:g} s (join_timeout_s)"
        )

    def _hear_of_the_end(self, there: Sequence[_Asked]) -> None:
        """See that it has not come after the end of the run.

        Raises:
            CommunicationError: it has.
        """
        for other in there:
            if other.phase == "end":
                raise CommunicationError(
                    f"{self.name}: the run has ended, after {other.count} means, as {other.name} says; "
                    "to begin another one wait until all of it have closed"
                )

    def _has_double(self, there: Sequence[_Asked]) -> bool:
        """Whether one of this name is there that has died; the lighthouse names it for a heartbeat more.

        Raises:
            ValueError: it lives.
        """
        for other in there:
            if other.name == self.name and other.life != self._life:
                try:
                    _see_alive(other.store)
                except OSError:
                    return True
                raise ValueError(
                    f"name={self.name!r}: a living worker has it; allowed is one that no other has"
                )
        return False

    def _begin(self, workers: Sequence[_Asked], facts: object, what: str) -> list[object]:
        """Make the first group.

        Raises:
            CommunicationError: one of them is gone.
        """
        try:
            self._form(workers)
            self.history = _hash("", self._group.key, "0")
            return self.all_gather_json(facts, what=what)
        except (RuntimeError, OSError) as error:
            # As in a mean: nobody else hears of it while this worker holds the group.
            traceback.clear_frames(error.__traceback__)
            self._leave_group()
            self.history = ""
            if isinstance(error, CommunicationError):
                raise
            raise CommunicationError(
                f"{self.name}: a worker is gone with which the run was to begin ({error}); start again"
            ) from error

    def attach(self, member: Member) -> None:
        """Take part from here on: be alive to the lighthouse, and make what `all_reduce` launches."""
        self._member = member
        if not self._threads:
            for run in (self._beat, self._communicate):
                thread = threading.Thread(target=run, name=f"distoptim {run.__name__}", daemon=True)
                self._threads.append(thread)
                thread.start()

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

    def _go(self, phase: str) -> None:
        if self._closed.is_set():
            return
        self._farewell = phase
        self._launches.put(None)
        for thread in self._threads[1:]:
            thread.join(self.timeout_s)
        self._closed.set()
        self._leave_group()
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
        self.history = saved["history"]
        self.count = saved["count"]
        self._note("goes on", self.name, f"from its file, after {self.count} means")
        return True

    # ---- the communication thread -----------------------------------------------------------------

    def _communicate(self) -> None:
        while (launch := self._launches.get()) is not None:
            self._answer(launch)
        if self.history and not self.joins:
            if self._unasked:
                # The others do not ask, and would wait for this worker in their next mean.
                time.sleep(_LAST_S)
                self._leave_group()
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        """Tell who asks; those that have just come, and ask again and again, may need to hear it twice."""
        for limit_s in (self.timeout_s, _FORGOTTEN_S, _FORGOTTEN_S):
            there = self._ask(self._farewell, {}, limit_s) or []
            if self._farewell == "leave" or not any(w.phase == "look" for w in there):
                return

    def _answer(self, launch: ElasticHandle) -> None:
        try:
            if launch.taken != self._given:
                raise MeanLost(f"{self.name}: launched before it had caught up")
            self._mean(launch)
        except CommunicationError as error:
            launch.end(error)
        except BaseException as error:  # noqa: BLE001  # the training thread waits: it must hear of any
            launch.end(CommunicationError(f"{self.name}: {type(error).__name__}: {error}"))

    def _mean(self, launch: ElasticHandle) -> None:
        """Ask, regroup, let who is behind catch up, all-reduce.

        Raises:
            MeanLost: a worker was lost on its way.
        """
        self._note_pace()
        before = (self.history, self.count)
        try:
            if self._unasked and not self.joins:
                self._unasked -= 1
            else:
                before = self._regroup(launch)
            self._all_reduce(launch)
        except (RuntimeError, OSError) as error:
            # At once: others of the group wait for this worker as long as it holds it, and who goes on
            # without asking finds out by it. It hears of nothing while anybody holds the group, as the
            # exception's frames do.
            traceback.clear_frames(error.__traceback__)
            self._leave_group()
            if isinstance(error, CommunicationError):
                raise
            self._failed = str(error).splitlines()[0]
            self._note("mean lost", self.name, self._failed)
            raise MeanLost(f"{self.name}: a mean is lost: {error}") from error
        history, count = before
        self.count = count + 1
        self.history = _hash(history, self._group.key, str(self.count))
        self.joins = False
        self._failed = ""
        launch.workers = self.size
        if launch.caught_up is not None:
            self._given += 1
        launch.end()
        if launch.caught_up is not None and self._member is not None:
            self._member.hurry(launch)

    def _regroup(self, launch: ElasticHandle) -> tuple[str, int]:
        """Ask, have the group, let who is behind catch up; history and count of those that are right."""
        members, leaving = self._members(launch.position)
        leading = _furthest(members)
        if not leading:
            self._hear_of_the_end(list(self._goodbyes.values()))
            raise CommunicationError(f"{self.name}: nobody is left of the run that it was to join")
        _check_positions(leading)
        self._form(members, first=leading[0])
        behind = [w for w in members if w.history != leading[0].history]
        if behind:
            self._catch_up(launch, members, leading[0], behind)
        if leaving:
            # Of one worker's pace, so that all leave off together.
            self._unasked = int(_FORGOTTEN_S / max(leading[0].every_s, 0.01)) + 1
        return leading[0].history, leading[0].count

    def _members(self, position: dict[str, Any]) -> tuple[list[_Asked], bool]:
        """Who takes part in the next mean, by name, and whether some leave; waits until there are enough."""
        too_few_until = None
        while not self._closed.is_set():
            before = self._quorum
            there = self._ask("round", position, self.timeout_s) or []
            members = sorted((w for w in there if w.phase == "round"), key=lambda w: w.name)
            leaving = {w.name: w for w in there if w.phase in ("leave", "end")}
            self._goodbyes.update(leaving)
            missing = set(self.members) - {w.name for w in members} - leaving.keys()
            if there and self._quorum < before and missing:
                too_few_until = time.monotonic() + _NEW_LIGHTHOUSE_S
            waits = too_few_until is not None and missing and time.monotonic() < too_few_until
            enough = len(members) >= self.min_workers
            if enough and not waits and any(w.life == self._life for w in members):
                return members, bool(leaving)
            time.sleep(_PAUSE_S)
        raise CommunicationError(f"{self.name}: this communicator has been closed")

    def _note_pace(self) -> None:
        now = time.monotonic()
        if self._launched_s:
            self._every_s = now - self._launched_s
        self._launched_s = now

    def _form(self, members: Sequence[_Asked], first: _Asked | None = None) -> None:
        """Have the group of these members: the one of before, if all have it still."""
        lives = tuple(w.life for w in members)
        held = {w.holds for w in members}
        if lives == self._group.lives and held == {self._group.key}:
            return
        self._leave_group()
        # Of how often they have asked, so that no group of before has the name.
        key = _hash(*(f"{w.life}{w.asked}" for w in members))
        self._note_members(members)
        self.rank = lives.index(self._life)
        self.size = len(members)
        group = _Group(key, lives)
        if self.size > 1:
            address = (first or members[0]).store
            mine = address == self._store_address
            store = self._store if mine else _client_of(address, self.timeout_s)
            store = _dist.PrefixStore(key, store)
            self._gather_at(store, members)
            work = _gloo(store, self.rank, self.size, self.host, self.timeout_s)
            group.work = work
            group.workers = _Among(work, self.rank, self.size, self.timeout_s)
        self._group = group

    def _note_members(self, members: Sequence[_Asked]) -> None:
        """Say who has come and who is gone since the last group, and why."""
        before = self._lives
        now = {w.name: w.life for w in members}
        if now == before:
            return
        self._lives = now
        self.members = list(now)
        self.generation += 1
        if not before:
            others = ", ".join(name for name in now if name != self.name) or "nobody yet"
            self._note("joined" if self.joins else "begins", self.name, f"with {others}")
            return
        for name in before:
            if now.get(name) != before[name]:
                self._note(*self._gone(name))
        for worker in members:
            if before.get(worker.name) != worker.life:
                self._note("joined", worker.name, "takes over what the others share")
        self._goodbyes.clear()

    def _gone(self, name: str) -> tuple[str, str, str]:
        goodbye = self._goodbyes.get(name)
        if goodbye is None:
            return "lost", name, self._failed or "not heard of any more"
        if goodbye.phase == "end":
            return "ended", name, f"the run is over for it, after {goodbye.count} means"
        return "left", name, f"in the middle of the run, after {goodbye.count} means"

    def _note(self, what: str, worker: str, why: str) -> None:
        self.events.append(Event(time.time(), what, worker, why))
        logger.info("%s: %s %s (%s)", self.name, worker, what, why)

    def tally(self) -> dict[str, float]:
        """How many workers came, were lost, and left."""
        seen = [event.what for event in self.events]
        return {
            "joins": seen.count("joined"),
            "losses": seen.count("lost"),
            "leaves": seen.count("left") + seen.count("ended"),
        }

    def _gather_at(self, store: Any, members: Sequence[_Asked]) -> None:
        """Wait until all have come to build their group, as long as those that have not are alive.

        A group that is built with one that died after the lighthouse named it would be waited for as long
        as one that stands still.

        Raises:
            RuntimeError: one is gone, or has not come within the timeout.
        """
        store.set(self._life, "")
        missing = [w for w in members if w.life != self._life]
        deadline = time.monotonic() + self.timeout_s
        while missing := [w for w in missing if not store.check([w.life])]:
            for worker in missing:
                _see_alive(worker.store)
            if time.monotonic() > deadline:
                raise RuntimeError(f"{missing[0].name} has not come within {self.timeout_s:g} s")
            time.sleep(_LOOK_S)

    def _catch_up(
        self,
        launch: ElasticHandle,
        members: Sequence[_Asked],
        giver: _Asked,
        behind: Sequence[_Asked],
    ) -> None:
        """One that is not behind gives what all share; who is behind sends nothing in this mean."""
        work = self._group.work
        source = members.index(giver)
        if self.rank == source:
            assert self._member is not None
            file = io.BytesIO()
            torch.save(self._member.give(), file)
            message = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
            for worker in behind:
                rank = members.index(worker)
                self._wait(work.send([torch.tensor([message.numel()])], rank, 0), worker)
                self._wait(work.send([message], rank, 1), worker)
        elif members[self.rank] in behind:
            size = torch.zeros(1, dtype=torch.int64)
            self._wait(work.recv([size], source, 0), giver)
            message = torch.zeros(int(size), dtype=torch.uint8)
            self._wait(work.recv([message], source, 1), giver)
            state = torch.load(io.BytesIO(message.numpy().tobytes()), weights_only=True)
            launch.caught_up = CatchUp(giver.position, state)
            missed = giver.count - self.count
            behind_by = f"{missed} means" if missed > 0 else "another history"
            if not self.joins:
                self._note("caught up", self.name, f"{behind_by} behind {giver.name}")

    def _wait(self, work: Any, other: _Asked) -> None:
        """Wait for a message to or from one worker; gloo would not hear of its death.

        Raises:
            RuntimeError: it is gone, or stands still for longer than the timeout.
        """
        over = threading.Event()

        def watch() -> None:
            try:
                while not over.wait(_PAUSE_S):
                    _see_alive(other.store)
            except OSError:
                work.abort()

        thread = threading.Thread(target=watch, name="distoptim watch", daemon=True)
        thread.start()
        try:
            if not work.wait(timedelta(seconds=self.timeout_s)):
                raise RuntimeError(f"{other.name} is gone")
        finally:
            over.set()
            thread.join()

    def _all_reduce(self, launch: ElasticHandle) -> None:
        workers = self._group.workers
        if launch.caught_up is None:
            launch.mean(workers, launch.buffer, self.timeout_s)
            return
        assert self._member is not None
        launch.buffer = self._member.listen(launch.caught_up, workers)

    def _leave_group(self) -> None:
        work = self._group.work
        self._group = _Group()
        # Who has none must ask who is there.
        self._unasked = 0
        if work is not None:
            work.abort()

    # ---- the lighthouse ---------------------------------------------------------------------------

    def _connect(self) -> Any:
        try:
            from torchft.coordination import LighthouseClient
        except ImportError as error:
            raise ValueError("Elastic needs torchft: pip install 'distoptim[elastic]'") from error
        deadline = time.monotonic() + self.join_timeout_s
        limit = timedelta(seconds=min(5.0, self.timeout_s))
        while time.monotonic() < deadline:
            with contextlib.suppress(RuntimeError, TimeoutError):
                return LighthouseClient(self._address, limit)
            time.sleep(_PAUSE_S)
        raise CommunicationError(f"{self.name}: no lighthouse answers at {self._address}")

    def _beat(self) -> None:
        """Be alive to the lighthouse, also while this worker computes or waits."""
        client = self._connect()
        while not self._closed.wait(_HEARTBEAT_S):
            # Where it is away, whoever asks it waits until it is back.
            with contextlib.suppress(RuntimeError, TimeoutError):
                client.heartbeat(self._id, timedelta(seconds=1.0))

    @property
    def _id(self) -> str:
        return f"{self.name}#{self._life}"

    def _ask(self, phase: str, position: dict[str, Any], limit_s: float) -> list[_Asked] | None:
        """Who asks now; None if the lighthouse does not answer."""
        self._asked += 1
        own = {
            "name": self.name,
            "life": self._life,
            "phase": phase,
            "history": self.history,
            "count": self.count,
            "position": position,
            "every_s": self._every_s,
            "holds": self._group.key,
            "asked": self._asked,
        }
        try:
            quorum = self._client.quorum(
                self._id,
                timedelta(seconds=limit_s),
                address="",
                store_address=self._store_address,
                step=0,
                world_size=1,
                shrink_only=False,
                data={"json": json.dumps(own)},
            )
        except TimeoutError:
            return None
        except RuntimeError:
            time.sleep(_PAUSE_S)
            return None
        self._quorum = int(quorum.quorum_id)
        return [
            _Asked(store=p.store_address, **json.loads(cast("str", p.data["json"])))
            for p in quorum.participants
        ]


def _mean(workers: Communicator, buffer: Tensor, timeout_s: float) -> None:
    workers.all_reduce(buffer).wait(timeout_s)


def _furthest(workers: Sequence[_Asked]) -> list[_Asked]:
    """Of the workers in a run those that are right: the largest history of the furthest, by name."""
    in_a_run = [w for w in workers if w.history]
    if not in_a_run:
        return []
    count = max(w.count for w in in_a_run)
    last = [w for w in in_a_run if w.count == count]
    histories = [w.history for w in last]
    chosen = max(sorted(set(histories)), key=histories.count)
    return sorted((w for w in last if w.history == chosen), key=lambda w: w.name)


def _check_positions(leading: Sequence[_Asked]) -> None:
    """Whether those that are not behind are in the same call.

    Raises:
        CommunicationError: on all of them.
    """
    if any(w.position["code"] != leading[0].position["code"] for w in leading):
        where = ", ".join(f"{w.name} in {w.position['what']}" for w in leading)
        raise CommunicationError(unlike_calls(where))


def _hash(*parts: str) -> str:
    return hashlib.sha1("|".join(parts).encode(), usedforsecurity=False).hexdigest()


def _own_store(host: str, timeout_s: float) -> tuple[Any, str]:
    """A store of this worker's at one address alone, and the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, 0), family=family)
    except OSError as error:
        raise ValueError(
            f"host={host!r}: {error.strerror}; allowed is an address of this machine"
        ) from error
    port = listening.getsockname()[1]
    store = _dist.TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listening.detach(),
    )
    return store, f"{host} {port}"


def _see_alive(store: str) -> tuple[str, int]:
    """Whether the process is there whose store this is: one that stands still is; its host and port.

    Raises:
        OSError: it is not.
    """
    host, _, port = store.rpartition(" ")
    socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    return host, int(port)


def _client_of(store: str, timeout_s: float) -> Any:
    # The client would try again until its timeout.
    host, port = _see_alive(store)
    limit = timedelta(seconds=timeout_s)
    return _dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)


def _gloo(store: Any, rank: int, size: int, host: str, timeout_s: float) -> Any:
    # torch has no public options of a backend.
    options = _dist.ProcessGroupGloo._Options()  # noqa: SLF001
    options._devices = [_dist.ProcessGroupGloo.create_device(hostname=host)]  # noqa: SLF001
    # All are here: connecting waits for nobody but one that dies in these milliseconds.
    options._timeout = timedelta(seconds=min(_CONNECT_S, timeout_s))  # noqa: SLF001
    group = _dist.ProcessGroupGloo(store, rank, size, options)
    group._set_default_timeout(timedelta(seconds=timeout_s))  # noqa: SLF001
    return group
