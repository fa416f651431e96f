"""Who takes part in the means of workers that come and go, and what has happened to them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from distoptim.comm.lighthouse import Asked

logger = logging.getLogger("distoptim")


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
class Roll:
    """The members as one worker sees them.

    Args:
        name: of that worker.

    Attributes:
        names: of the members, sorted.
        generation: how often they have changed.
        events: what has happened so far.
        goodbyes: of those that have said it since the members last changed, by name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.names: list[str] = [name]
        self.generation = 0
        self.events: list[Event] = []
        self.goodbyes: dict[str, Asked] = {}
        self._lives: dict[str, str] = {}

    def note(self, what: str, worker: str, why: str) -> None:
        """Keep and log it."""
        self.events.append(Event(time.time(), what, worker, why))
        logger.info("%s: %s %s (%s)", self.name, worker, what, why)

    def call(self, members: Sequence[Asked], *, joins: bool, failed: str) -> None:
        """These take part from now on: say who has come and who is gone, and why.

        Args:
            members: all of them.
            joins: whether this worker has just come to them.
            failed: of what a mean was lost meanwhile; "" where none was.
        """
        before = self._lives
        now = {w.name: w.life for w in members}
        if now == before:
            return
        self._lives = now
        self.names = list(now)
        self.generation += 1
        if not before:
            others = ", ".join(name for name in now if name != self.name) or "nobody yet"
            self.note("joined" if joins else "begins", self.name, f"with {others}")
            return
        for name in before:
            if now.get(name) != before[name]:
                self._note_gone(name, failed)
        for worker in members:
            if before.get(worker.name) != worker.life:
                self.note("joined", worker.name, "takes over what the others share")
        self.goodbyes.clear()

    def _note_gone(self, name: str, failed: str) -> None:
        goodbye = self.goodbyes.get(name)
        if goodbye is None:
            self.note("lost", name, failed or "not heard of any more")
        elif goodbye.said.phase == "end":
            self.note("ended", name, f"the run is over for it, after {goodbye.said.count} means")
        else:
            self.note("left", name, f"in the middle of the run, after {goodbye.said.count} means")

    def tally(self) -> dict[str, float]:
        """How many workers came, were lost, and left."""
        seen = [event.what for event in self.events]
        return {
            "joins": seen.count("joined"),
            "losses": seen.count("lost"),
            "leaves": seen.count("left") + seen.count("ended"),
        }
