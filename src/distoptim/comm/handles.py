"""A mean in flight: what the engine holds between a launch and its merge."""

from __future__ import annotations

import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, final

import torch.distributed as dist
from torch import Tensor

# Between looks whether a collective is over, where second stages of other means are still to be started.
_LOOK_S = 0.0005


@dataclass(frozen=True)
class CatchUp:
    """What a worker that was behind has been given.

    Attributes:
        position: where the giver was when it launched the mean.
        state: what all workers shared then.
        heard: the fragments, by index, of which this worker's last payload is in a mean of the others that was
            lost here alone.
    """

    position: dict[str, Any]
    state: dict[str, Any]
    heard: frozenset[int] = frozenset()


class Handle(ABC):
    """A collective in flight.

    Args:
        buffer: where the result will be; of a mean, its last element is the mean weight of the
            workers.
        now: the time of the launch, in seconds of the communicator's clock.

    Attributes:
        launched_at: when it was launched, in seconds of the communicator's clock.
        finished_at: when the result was there, late by up to a local step; None while it is not
            known to be.
        waited_s: how long the worker's computation stood still for it; None while that is not
            known.
        worked_s: how long the worker computed for it after the launch (codes).
        workers: how many are in it, where that is not all of the communicator's.
        caught_up: what this worker was given with it, if it was behind the others.
    """

    workers: int | None = None
    caught_up: CatchUp | None = None

    def __init__(self, buffer: Tensor, *, now: float = 0.0) -> None:
        self.buffer = buffer
        self.launched_at = now
        self.finished_at: float | None = None
        self.unfinished_at = now
        self.waited_s: float | None = None
        self.worked_s = 0.0

    def poll(self) -> None:  # noqa: B027  # optional
        """Do what can be done without waiting; comes with every local step."""

    @abstractmethod
    def wait(self, timeout_s: float) -> None:
        """Block until the result is in the buffer; note `waited_s`, and `finished_at` if it is known.

        Raises:
            RuntimeError: on failure, or after `timeout_s`.
        """

    def tails(self, count: int) -> Tensor:
        """The result's last elements, on the host; after `wait`."""
        return self.buffer[-count:]

    @property
    def is_there(self) -> bool:
        """Whether the result is known to be in the buffer; asked where workers come and go."""
        return False

    @property
    def seconds(self) -> float:
        """How long it took, as far as is known; 0 for what was there already."""
        return 0.0 if self.finished_at is None else self.finished_at - self.launched_at


@final
class FinishedHandle(Handle):
    """A collective that is over already: its result is in the buffer."""

    def wait(self, timeout_s: float) -> None:
        """At once."""
        self.waited_s = 0.0

    @property
    def is_there(self) -> bool:
        """Always."""
        return True


class TimedHandle(Handle, ABC):
    """A collective that takes real time; subclasses say how to wait for it."""

    def wait(self, timeout_s: float) -> None:
        """Block, and count for how long."""
        start = time.perf_counter()
        self._wait(timeout_s)
        end = time.perf_counter()
        self.waited_s = (self.waited_s or 0.0) + end - start
        if self.finished_at is None:
            self.finished_at = end
            self.unfinished_at = end

    def look(self, over: bool) -> None:
        """Note whether it is over now."""
        if self.finished_at is None:
            now = time.perf_counter()
            if over:
                self.finished_at = now
            else:
                self.unfinished_at = now

    @property
    def seconds(self) -> float:
        """Until the middle between the last look at which it was under way and the first at which it was not."""
        if self.finished_at is None:
            return 0.0
        return (self.finished_at + self.unfinished_at) / 2 - self.launched_at

    @abstractmethod
    def _wait(self, timeout_s: float) -> None:
        """Block; raises RuntimeError on failure or after `timeout_s`."""


@final
class WorkHandle(TimedHandle):
    """A collective of a torch.distributed backend; its end is noted at the first `poll` after it.

    A callback on the work's future would note it exactly, but in the backend's thread, which needs
    the interpreter lock for it: a training thread that leaves the group at that moment holds the
    lock and waits for the thread (seen with torch 2.6).

    Args:
        work: the collective.
        buffer: where the result will be.
        divisor: what the result is still to be divided by.
    """

    def __init__(self, work: dist.Work, buffer: Tensor, divisor: int = 1) -> None:
        super().__init__(buffer, now=time.perf_counter())
        self.work: dist.Work | None = work
        self._divisor = divisor

    def poll(self) -> None:
        """Note the end."""
        if self.work is not None:
            self.look(self.work.is_completed())

    def _wait(self, timeout_s: float) -> None:
        # The work is forgotten, since a failure reaches the peers only when nobody holds it.
        work = self.work
        self.work = None
        if work is not None:
            limit = time.perf_counter() + timeout_s
            while _here.stages and not work.is_completed() and time.perf_counter() < limit:
                if not _go_on():
                    break
                time.sleep(_LOOK_S)
            work.wait(timedelta(seconds=_left(limit)))
            if self._divisor != 1:
                self.buffer.div_(self._divisor)


class Stages:
    """Starts the second stages of a communicator's two-stage means: first launched, first started,
    on all ranks, whenever each has its first stages.

    They travel over connections of their own, on which nothing else does: elsewhere the ranks would
    not agree what comes before them. A second stage starts at the first `poll` (one comes with
    every local step) of any of the handles that finds it to be next and its first stage over, or in
    `wait`: of its mean, or of any other collective in this thread. Otherwise a worker that waits in a
    group of neighbours would hold up those who wait for this mean, and they it.
    """

    def __init__(self) -> None:
        self.queue: deque[TwoStageHandle] = deque()
        self.failure: RuntimeError | None = None
        self._starting = False

    def add(self, handle: TwoStageHandle) -> None:
        """Its second stage is to start after those of before."""
        self.queue.append(handle)
        _here.stages.add(self)

    @property
    def is_left(self) -> bool:
        """Whether something is to be started, and nobody is about to."""
        return bool(self.queue) and self.failure is None and not self._starting

    def poll(self) -> None:
        """Start what can be started without waiting. A failure is kept for whoever waits."""
        try:
            while self.is_left and self.queue[0].arrived():
                self._start_oldest(1.0)
        except RuntimeError as error:
            self.failure = error

    def start(self, handle: TwoStageHandle, limit: float) -> None:
        """Wait for the first stages up to this handle's, and start the second ones.

        Raises:
            RuntimeError: a first stage failed, or is not over at `limit`.
        """
        while handle.second is None:
            if self.failure is not None:
                raise RuntimeError(
                    f"the first stage of a coded mean failed: {self.failure}"
                ) from self.failure
            self._start_oldest(_left(limit))

    def _start_oldest(self, timeout_s: float) -> None:
        # It stays the oldest until its second stage has been started: after a failure nothing
        # behind it may overtake it.
        self._starting = True
        try:
            self.queue[0].go_on(timeout_s)
        except RuntimeError:
            raise
        except Exception as error:
            # Of a codec; it belongs to this mean, not to whatever is waited for at the moment.
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        finally:
            self._starting = False
        self.queue.popleft()


class _OfThread(threading.local):
    """Those stages at which this thread has launched a mean."""

    def __init__(self) -> None:
        self.stages: weakref.WeakSet[Stages] = weakref.WeakSet()


_here = _OfThread()


def _go_on() -> bool:
    """Start the second stages of this thread that can be started without waiting; whether some are left."""
    stages = list(_here.stages)
    for each in stages:
        each.poll()
        if not each.queue:
            _here.stages.discard(each)
    return any(each.is_left for each in stages)


@final
class TwoStageHandle(Handle):
    """A mean whose second stage can start only when the first has ended, at another moment on each
    rank.

    Args:
        first: the first stage, under way.
        go_on: called once, when the first stage is over, with its handle; starts the second.
        stages: in which order the second stages of this communicator start.
    """

    def __init__(self, first: Handle, go_on: Callable[[Handle], Handle], stages: Stages) -> None:
        super().__init__(first.buffer, now=first.launched_at)
        self.first = first
        self.second: Handle | None = None
        self._go_on = go_on
        self._stages = stages
        stages.add(self)

    def arrived(self) -> bool:
        """Whether the first stage is over, well or not."""
        self.first.poll()
        return self.first.finished_at is not None

    def go_on(self, timeout_s: float) -> None:
        """Wait for the first stage and start the second."""
        self.first.wait(timeout_s)
        self.second = self._go_on(self.first)
        self.buffer = self.second.buffer

    def poll(self) -> None:
        """Start what can be started; note the end."""
        self._stages.poll()
        if self.second is not None:
            self.second.poll()
            self.finished_at = self.second.finished_at

    def wait(self, timeout_s: float) -> None:
        """Block until both stages are over; what is made between them does not count as waiting."""
        limit = time.perf_counter() + timeout_s
        self._stages.start(self, limit)
        assert self.second is not None
        self.second.wait(_left(limit))
        self.finished_at = self.second.finished_at
        self.waited_s = (self.first.waited_s or 0.0) + (self.second.waited_s or 0.0)

    @property
    def seconds(self) -> float:
        """From the launch to the end of the second stage, with the time in which that had not been started yet."""
        if self.second is None or self.finished_at is None:
            return 0.0
        return self.second.launched_at - self.launched_at + self.second.seconds


def _left(limit: float) -> float:
    """Seconds until then; a little where there are none, since gloo takes 0 for its default."""
    return max(1e-3, limit - time.perf_counter())
