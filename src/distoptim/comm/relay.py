"""Collectives in two stages, whose second can start only when the first has ended.

At another moment on each rank.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from distoptim.comm.communicator import Handle


@dataclass(frozen=True)
class Relay:
    """Everybody sends each worker that one's part, each makes something of what it got, and sends
    it to everybody.

    A compressed all-reduce works so (DeepSpeed's 1-bit Adam, Tang et al., arXiv 2102.02888): what
    is made is the parts' coded mean.

    Attributes:
        parts: [workers, bytes]; row j is for worker j.
        received: [workers, bytes]; row i becomes worker i's part for this worker.
        between: called once, when `received` is there; fills `own`.
        own: [bytes], what this worker sends to all.
        all_: [workers, bytes]; row i becomes worker i's `own`.
    """

    parts: Tensor
    received: Tensor
    between: Callable[[], None]
    own: Tensor
    all_: Tensor

    @property
    def sent(self) -> int:
        """Bytes this worker sends to the others together."""
        return (len(self.parts) - 1) * (self.parts[0].nbytes + self.own.nbytes)


class Relays:
    """Starts second stages: first launched, first started, on all ranks, whenever each has its
    first stages.

    For that they need connections of their own, on which nothing else travels: elsewhere the ranks
    would not agree what comes before them. A second stage starts at the first `poll` (one comes
    with every local step) of any of the handles that finds it to be next and its first stage over,
    or in `wait`.

    Args:
        swap: starts an all-to-all of rows.
        gather: starts an all-gather into rows, over those connections.
    """

    def __init__(
        self, swap: Callable[[Tensor, Tensor], Handle], gather: Callable[[Tensor, Tensor], Handle]
    ) -> None:
        self.swap, self.gather = swap, gather
        self.queue: deque[RelayHandle] = deque()
        self.failure: RuntimeError | None = None

    def launch(self, relay: Relay) -> RelayHandle:
        """Start the first stage."""
        handle = RelayHandle(relay, self)
        self.queue.append(handle)
        return handle

    def poll(self) -> None:
        """Start what can be started without waiting. A failure is kept for whoever waits."""
        try:
            while self.queue and self.failure is None and self.queue[0].arrived():
                self._start_oldest(1.0)
        except RuntimeError as error:
            self.failure = error

    def start(self, handle: RelayHandle, limit: float) -> None:
        """Wait for the first stages up to this handle's, and start the second ones."""
        while handle.second is None:
            if self.failure is not None:
                raise RuntimeError(
                    f"the first stage of a coded mean failed: {self.failure}"
                ) from self.failure
            self._start_oldest(left(limit))

    def _start_oldest(self, timeout_s: float) -> None:
        self.queue[0].go_on(timeout_s)
        self.queue.popleft()


class RelayHandle(Handle):
    """A relay under way; after `wait` everybody's `own` is in `all_`."""

    def __init__(self, relay: Relay, relays: Relays) -> None:
        self._relay, self._relays = relay, relays
        self._first = relays.swap(relay.parts, relay.received)
        self.second: Handle | None = None
        super().__init__(relay.all_, now=self._first.launched_at)

    def arrived(self) -> bool:
        """Whether the first stage is over, well or not."""
        self._first.poll()
        return self._first.finished_at is not None

    def go_on(self, timeout_s: float) -> None:
        """Wait for the first stage and start the second."""
        self._first.wait(timeout_s)
        self._relay.between()
        self.second = self._relays.gather(self._relay.own, self._relay.all_)

    def poll(self) -> None:
        """Start what can be started; note the end."""
        self._relays.poll()
        if self.second is not None:
            self.second.poll()
            self.finished_at = self.second.finished_at

    def wait(self, timeout_s: float) -> None:
        """Block until both stages are over; what is made between them does not count as waiting."""
        limit = time.perf_counter() + timeout_s
        self._relays.start(self, limit)
        assert self.second is not None
        self.second.wait(left(limit))
        self.finished_at = self.second.finished_at
        self.waited_s = (self._first.waited_s or 0.0) + (self.second.waited_s or 0.0)

    @property
    def seconds(self) -> float:
        """From the launch to the end of the second stage, with the time in which that had not been started yet."""
        if self.second is None or self.finished_at is None:
            return 0.0
        return self.second.launched_at - self.launched_at + self.second.seconds


def left(limit: float) -> float:
    """Seconds until then; a little where there are none, since gloo takes 0 for its default."""
    return max(1e-3, limit - time.perf_counter())
