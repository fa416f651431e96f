"""When virtual workers are lost, leave, and come back: as listed, or at a rate."""

from __future__ import annotations

import csv
import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from distoptim import checks

LOST = "lost"
LEFT = "left"
BACK = "back"
KINDS = (LOST, LEFT, BACK)


@dataclass(frozen=True, order=True)
class Change:
    """Something that happens to a worker.

    Args:
        seconds: when, in virtual time, >= 0.
        worker: its number.
        what: "lost", without a word; "left", with a goodbye; "back", as one that knows nothing any more.

    Raises:
        ValueError: a value outside its range.
    """

    seconds: float
    worker: int
    what: str

    def __post_init__(self) -> None:
        """Check the ranges."""
        checks.number("seconds", self.seconds, 0, math.inf, open_high=True)
        checks.integer("worker", self.worker, 0)
        if self.what not in KINDS:
            raise ValueError(f"what={self.what!r}: allowed are {', '.join(KINDS)}")


class Churn(Protocol):
    """Who comes and goes."""

    def changes(self, workers: int) -> Iterator[Change]:
        """All that happens to so many workers, who are all there at the start, in order of time.

        Equal at each call. At least one worker is always there.

        Raises:
            ValueError: there is something that cannot happen to them.
        """


@dataclass(frozen=True)
class Listed:
    """What happens, in any order.

    Args:
        listed: the changes.
    """

    listed: Sequence[Change]

    @classmethod
    def read(cls, path: str | Path) -> Listed:
        """From a CSV file: seconds, worker, what; empty lines and lines that begin with # are left out.

        Raises:
            ValueError: naming file and line.
        """
        found = []
        with Path(path).open(newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if row and not row[0].startswith("#"):
                    found.append(_change(path, number, row))
        return cls(found)

    def changes(self, workers: int) -> Iterator[Change]:
        """In order of time."""
        there = set(range(workers))
        for change in sorted(self.listed):
            if change.worker >= workers:
                raise ValueError(f"{change}: there are {workers} workers, from 0 on")
            if (change.worker in there) is (change.what == BACK):
                raise ValueError(f"{change}: it is {'there' if change.what == BACK else 'away'}")
            (there.add if change.what == BACK else there.remove)(change.worker)
            if not there:
                raise ValueError(f"{change}: nobody would be left; allowed is one or more")
        return iter(sorted(self.listed))


def _change(path: str | Path, number: int, row: list[str]) -> Change:
    try:
        seconds, worker, what = row
        return Change(float(seconds), int(worker), what.strip())
    except ValueError as error:
        raise ValueError(
            f"{path}, line {number}: expected seconds,worker,what with what one of {', '.join(KINDS)} ({error})"
        ) from None


@dataclass(frozen=True)
class Regular:
    """One worker is lost every so many seconds, and comes back after a while.

    Which one is drawn among those that are there; nobody, where only one is.

    Args:
        every_s: seconds from one loss to the next, > 0.
        away_s: seconds from a loss to the return, > 0.
        seed: of the draws.

    Raises:
        ValueError: a value outside its range.
    """

    every_s: float
    away_s: float
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("every_s", "away_s"):
            checks.number(name, getattr(self, name), 0, math.inf, open_low=True, open_high=True)

    def changes(self, workers: int) -> Iterator[Change]:
        """Without end."""
        choose = np.random.default_rng((self.seed, workers))
        there = set(range(workers))
        coming: list[tuple[float, int]] = []
        for number in itertools.count(1):
            now = number * self.every_s
            while coming and coming[0][0] <= now:
                back_s, worker = heapq.heappop(coming)
                there.add(worker)
                yield Change(back_s, worker, BACK)
            if len(there) > 1:
                worker = int(choose.choice(sorted(there)))
                there.remove(worker)
                heapq.heappush(coming, (now + self.away_s, worker))
                yield Change(now, worker, LOST)
