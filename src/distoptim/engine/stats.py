"""What an optimizer measures about itself, always: a few additions per round."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from distoptim.comm import Handle
from distoptim.engine.history import KEPT


@dataclass
class Counters:
    """Running totals of this worker; seconds, bytes, local steps.

    Attributes:
        virtual: whether the clock is a simulator's, on which merging takes no time.
        ticked_at: when the last `average()` was over, or began, if nothing was due in it.
        until: up to when it is known what this worker did.
        spans: what it did last, each the fields of a `history.Span`.
        follow: called with them at every local step; None: nobody writes them.
    """

    virtual: bool = False
    exposed_s: float = 0.0
    hidden_s: float = 0.0
    overhead_s: float = 0.0
    bytes: int = 0
    syncs: int = 0
    staleness: int = 0
    quarantined: int = 0
    lost: int = 0
    catch_ups: int = 0
    started_at: float | None = None
    ticked_at: float = 0.0
    ticks: int = 0
    step_s: float = 0.0
    unread: list[Handle] = field(default_factory=list)
    until: float = 0.0
    spans: deque[tuple[Any, ...]] = field(default_factory=lambda: deque(maxlen=KEPT))
    follow: Callable[[Sequence[tuple[Any, ...]]], None] | None = None

    def tick(self, now: float) -> None:
        """Note the time of a local step."""
        begun = self.ticked_at
        self.ticked_at = now
        self.until = now
        if self.started_at is None:
            self.started_at = now
            return
        self.ticks += 1
        self.step_s = (now - self.started_at) / self.ticks
        # A plain tuple, since this comes with every local step.
        self.spans.append(("step", begun, now, self.ticks, -1))
        if self.follow is not None:
            self.follow(self.spans)

    def launched(self, fragment: int, nbytes: int, seconds: float) -> None:
        """Count a launch."""
        self.bytes += nbytes
        spent = 0.0 if self.virtual else seconds
        self.overhead_s += spent
        self.spans.append(("launch", self.until, self.until + spent, self.ticks, fragment))
        self.until += spent

    def waited(self, handle: Handle, fragment: int = -1) -> None:
        """Count a handle that has been waited for; a GPU's wait is known only some time later."""
        if handle.waited_s is None:
            self.unread.append(handle)
            return
        self.exposed_s += handle.waited_s
        self.overhead_s += 0.0 if self.virtual else handle.worked_s
        if handle.finished_at is not None:
            hidden = handle.finished_at - handle.launched_at - handle.waited_s
            self.hidden_s += max(0.0, hidden)
            mean = ("in flight", handle.launched_at, handle.finished_at, self.ticks, fragment)
            self.spans.append(mean)
        if handle.waited_s:
            end = self.until + handle.waited_s
            self.spans.append(("wait", self.until, end, self.ticks, fragment))
            self.until = end

    def merged(self, staleness: int, fragment: int, seconds: float) -> None:
        """Count a merge."""
        self.syncs += 1
        self.staleness += staleness
        spent = 0.0 if self.virtual else seconds
        self.overhead_s += spent
        self.spans.append(("merge", self.until, self.until + spent, self.ticks, fragment))
        self.until += spent

    def lose(self, fragment: int) -> None:
        """Count a mean that will never come."""
        self.lost += 1
        self.spans.append(("lost", self.until, self.until, self.ticks, fragment))

    def catch_up(self) -> None:
        """Count that this worker took over what the others share."""
        self.catch_ups += 1
        self.spans.append(("catch up", self.until, self.until, self.ticks, -1))

    def collect(self) -> float:
        """Add up the waits that are known by now; returns their sum."""
        unread = self.unread
        self.unread = []
        for handle in unread:
            handle.poll()
            self.waited(handle)
        return self.exposed_s

    def report(self, steps: int, tau: int) -> dict[str, float]:
        """The totals by name."""
        self.collect()
        elapsed = self.ticked_at - self.started_at if self.started_at is not None else 0.0
        computation = max(0.0, elapsed - self.exposed_s - self.overhead_s)
        return {
            "steps": steps,
            "tau": tau,
            "syncs": self.syncs,
            "exposed_s": self.exposed_s,
            "hidden_s": self.hidden_s,
            "overhead_s": self.overhead_s,
            "computation_s": computation,
            "exposed_share": self.exposed_s / computation if computation else 0.0,
            "bytes": self.bytes,
            "staleness": self.staleness / self.syncs if self.syncs else 0.0,
            "quarantined": self.quarantined,
            "lost": self.lost,
            "catch_ups": self.catch_ups,
        }
