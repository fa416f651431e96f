"""What a link between workers costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from distoptim import checks


@dataclass(frozen=True)
class Link:
    """The cost of a collective on a ring of n workers: round trips plus the bytes each worker must
    send.

    Args:
        latency_s: seconds one message takes, >= 0.
        bandwidth_gbit_s: each worker's rate in Gbit/s, > 0; infinite means latency alone.

    Raises:
        ValueError: a value outside its range.
    """

    latency_s: float
    bandwidth_gbit_s: float

    def __post_init__(self) -> None:
        """Check the ranges."""
        checks.number("latency_s", self.latency_s, 0, math.inf, open_high=True)
        if self.bandwidth_gbit_s != math.inf:
            checks.number(
                "bandwidth_gbit_s",
                self.bandwidth_gbit_s,
                0,
                math.inf,
                open_low=True,
                open_high=True,
            )

    def all_reduce_s(self, nbytes: float, workers: int) -> float:
        """T = 2 (n-1) latency + 2 (n-1)/n bytes / rate, in seconds (Patarasuk & Yuan 2009, ring)."""
        return 2 * self.broadcast_s(nbytes / workers, workers)

    def broadcast_s(self, nbytes: float, workers: int) -> float:
        """T = (n-1) (latency + bytes / rate), in seconds: from one worker to the next."""
        return (workers - 1) * (self.latency_s + nbytes * 8 / (self.bandwidth_gbit_s * 1e9))
