"""What a mean over the workers costs: a ring or a tree of equal or different links, or two
tiers of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from distoptim import checks
from distoptim.comm import Link
from distoptim.comm.streams import AUTO, check, choose, mean_s


class Network(Protocol):
    """A model of communication time."""

    def all_reduce_s(self, nbytes: float, workers: int) -> float:
        """Seconds from the arrival of the last worker to the end."""


@dataclass(frozen=True)
class Ring:
    """A ring all-reduce over links that may differ: every step of it waits for the slowest.

    T = max over the links of 2 (n-1) (latency + bytes / (n rate)).

    Args:
        links: one per worker, reused in turn where there are more workers.
    """

    links: Sequence[Link]

    def all_reduce_s(self, nbytes: float, workers: int) -> float:
        """Seconds of one mean, the slowest part of its way deciding."""
        return max(link.all_reduce_s(nbytes, workers) for link in _cycle(self.links, workers))


@dataclass(frozen=True)
class Gloo:
    """A ring over TCP as gloo makes it, of which one connection moves so many bytes a round trip only.

    T as `distoptim.comm.streams.mean_s` says: that of a ring where messages are short or near.

    Args:
        link: between any two workers; its latency is that of one message of gloo, a round trip.
        streams: connections at once, 1 to 64, or "auto", as many as the optimizers would take.

    Raises:
        ValueError: a value outside its range.
    """

    link: Link
    streams: int | str = AUTO

    def __post_init__(self) -> None:
        """Check the range."""
        check(self.streams)

    def all_reduce_s(self, nbytes: float, workers: int) -> float:
        """Seconds of one mean, the slowest part of its way deciding."""
        if workers == 1:
            return 0.0
        count = self.streams
        if not isinstance(count, int):
            count = choose(int(nbytes), self.link, workers)
        return mean_s(nbytes, self.link, workers, count)


@dataclass(frozen=True)
class Tree:
    """A reduction up a binary tree and a broadcast down: few messages, each with all the bytes.

    T = max over the links of 2 ceil(log2 n) (latency + bytes / rate). Better than a ring where
    latency rules.

    Args:
        links: one per worker, reused in turn where there are more workers.
    """

    links: Sequence[Link]

    def all_reduce_s(self, nbytes: float, workers: int) -> float:
        """Seconds of one mean, the slowest part of its way deciding."""
        hops = 2 * math.ceil(math.log2(workers))
        return max(hops * link.broadcast_s(nbytes, 2) for link in _cycle(self.links, workers))


@dataclass(frozen=True)
class TwoTier:
    """Sites with fast links inside and slow ones between: a ring inside, then one over the sites'
    first workers.

    T = ring inside + ring between + broadcast inside, the last as long as half the ring inside.

    Args:
        size: workers in a site, >= 1; the last site may be smaller.
        inside: the link between two workers of a site.
        between: the link between two sites.

    Raises:
        ValueError: a value outside its range.
    """

    size: int
    inside: Link
    between: Link

    def __post_init__(self) -> None:
        """Check the range."""
        checks.integer("size", self.size, 1)

    def all_reduce_s(self, nbytes: float, workers: int) -> float:
        """Seconds of one mean, the slowest part of its way deciding."""
        members = min(self.size, workers)
        inside = self.inside.all_reduce_s(nbytes, members)
        return 1.5 * inside + self.between.all_reduce_s(nbytes, math.ceil(workers / self.size))


def _cycle(links: Sequence[Link], workers: int) -> Sequence[Link]:
    if not links:
        raise ValueError("links=[]: allowed is one link per worker")
    return [links[i % len(links)] for i in range(workers)] if workers < len(links) else links
