"""What an optimizer measures about itself, always: a few additions per round."""

from __future__ import annotations

from dataclasses import dataclass, field

from distoptim.comm import Handle


@dataclass
class Counters:
    """Running totals of this worker; seconds, bytes, local steps."""

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

    def tick(self, now: float) -> None:
        """Note the time of a local step."""
        self.ticked_at = now
        if self.started_at is None:
            self.started_at = self.ticked_at
            return
        self.ticks += 1
        self.step_s = (now - self.started_at) / self.ticks

    def waited(self, handle: Handle) -> None:
        """Count a handle that has been waited for; a GPU's wait is known only some time later."""
        if handle.waited_s is None:
            self.unread.append(handle)
            return
        self.exposed_s += handle.waited_s
        self.overhead_s += handle.worked_s
        if handle.finished_at is not None:
            hidden = handle.finished_at - handle.launched_at - handle.waited_s
            self.hidden_s += max(0.0, hidden)

    def merged(self, staleness: int, seconds: float) -> None:
        """Count a merge."""
        self.syncs += 1
        self.staleness += staleness
        self.overhead_s += seconds

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
        computation = max(0.0, elapsed - self.exposed_s)
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
