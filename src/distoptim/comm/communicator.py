"""What the engine asks of a communicator, and the one for a worker that is alone."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from distoptim.comm.relay import Relay


class CommunicationError(RuntimeError):
    """A collective failed or did not end in time.

    Local parameters and anchors are valid and can be saved.
    """


class Handle:
    """A mean in flight. This class itself: one that is there already.

    Args:
        buffer: where the mean will be; its last element is the mean weight of the workers.

    Attributes:
        launched_at: when it was launched, in seconds of the communicator's clock.
        finished_at: when the mean was there, late by up to a local step; None while it is not known
            to be.
        waited_s: how long the worker's computation stood still for it; None while that is not
            known.
        worked_s: how long the worker computed for it after the launch (codes).
    """

    def __init__(self, buffer: Tensor, *, now: float = 0.0) -> None:
        self.buffer = buffer
        self.launched_at = now
        self.finished_at: float | None = None
        self.waited_s: float | None = None
        self.worked_s = 0.0

    def poll(self) -> None:
        """Do what can be done without waiting; comes with every local step."""

    def wait(self, timeout_s: float) -> None:
        """Block until the mean is in the buffer.

        Raises RuntimeError on failure or after `timeout_s`.
        """
        self.waited_s = 0.0

    def tail(self, index: int = -1) -> float:
        """One of the mean's last elements, counted from the end, on the host; after `wait`."""
        return float(self.buffer[index])

    @property
    def seconds(self) -> float:
        """How long it took, as far as is known; 0 for a mean that was there already."""
        return 0.0 if self.finished_at is None else self.finished_at - self.launched_at


class RealHandle(Handle, ABC):
    """A mean that takes real time; subclasses say how to wait for it."""

    def __init__(self, buffer: Tensor) -> None:
        super().__init__(buffer, now=time.perf_counter())
        self.unfinished_at = self.launched_at

    def wait(self, timeout_s: float) -> None:
        """Block, by the clock."""
        start = time.perf_counter()
        self._wait(timeout_s)
        end = time.perf_counter()
        self.waited_s = (self.waited_s or 0.0) + end - start
        if self.finished_at is None:
            self.finished_at = self.unfinished_at = end

    @property
    def seconds(self) -> float:
        """Until the middle between the last look at which it was under way and the first at which it was not."""
        return (
            0.0
            if self.finished_at is None
            else (self.finished_at + self.unfinished_at) / 2 - self.launched_at
        )

    @abstractmethod
    def _wait(self, timeout_s: float) -> None:
        """Block; raises RuntimeError on failure or after `timeout_s`."""


@runtime_checkable
class Communicator(Protocol):
    """Moves bytes between workers.

    Calls come from the training thread, in the same order on all ranks.
    """

    rank: int
    size: int

    def now(self) -> float:
        """The clock of this worker, in seconds."""

    def launch_mean(self, buffer: Tensor) -> Handle:
        """Start replacing `buffer` by its mean over the workers.

        Nobody may touch the buffer meanwhile.
        """

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """Replace `buffer` by that of rank `source`. Blocks."""

    def exchange(self, message: object) -> list[object]:
        """Everybody's message, in rank order; small control data. Blocks."""

    def close(self) -> None:
        """Finish or abandon what is in flight and leave the groups. Twice is fine."""


@runtime_checkable
class Gathering(Communicator, Protocol):
    """A communicator by which codes travel."""

    def launch_gather(self, own: Tensor, all_: Tensor) -> Handle:
        """Start filling all_[rank] with every worker's `own`; nobody may touch either meanwhile."""

    def launch_relay(self, relay: Relay) -> Handle:
        """Start both stages, one after the other.

        Nobody may touch the relay's tensors meanwhile.
        """


class SingleWorker:
    """The communicator of one worker: the mean is its own value."""

    rank = 0
    size = 1

    def now(self) -> float:
        """Real time."""
        return time.perf_counter()

    def launch_mean(self, buffer: Tensor) -> Handle:
        """The mean of one is there at once."""
        return Handle(buffer)

    def launch_gather(self, own: Tensor, all_: Tensor) -> Handle:
        """The own code."""
        all_[0].copy_(own)
        return Handle(all_)

    def launch_relay(self, relay: Relay) -> Handle:
        """The own part there and back."""
        relay.received.copy_(relay.parts)
        relay.between()
        relay.all_[0].copy_(relay.own)
        return Handle(relay.all_)

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """Nothing to receive."""

    def exchange(self, message: object) -> list[object]:
        """The own message."""
        return [message]

    def close(self) -> None:
        """Nothing to leave."""
