"""Streams: one message cut into parts, each over connections of its own, for long fat links.

A gloo group keeps at most two segments of 1 MiB in flight, so that it moves about 1.75 MB a round trip
whatever the link could carry; k groups at once move k times as much.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import final

from torch import Tensor

from distoptim import checks
from distoptim.comm.handles import TimedHandle
from distoptim.comm.link import Link

AUTO = "auto"
MOST = 64
"""Streams that may be asked for."""

MOST_CHOSEN = 8
"""Streams that "auto" takes at the most: each costs files and threads for every worker."""

PER_ROUND_TRIP = 1.75e6
"""Bytes that one gloo group moves in a round trip, as measured (docs/measurements.md)."""

LEAST_STREAM = 4e6
"""Bytes from which one more stream gains anything, as measured on the same link."""

NEAR_S = 4e-3
"""Round trips up to here leave nothing to gain."""

_LEAST_PART = 2**18
_SPARE_FILES = 64
_FILES = Path("/proc/self/fd")


def check(streams: object) -> int | str:
    """A number of streams, or "auto".

    Raises:
        ValueError: it is neither.
    """
    if streams == AUTO:
        return AUTO
    if isinstance(streams, str):
        raise ValueError(f"streams={streams!r}: allowed is 'auto' or an integer from 1 to {MOST}")
    return checks.integer("streams", streams, 1, MOST)


def choose(nbytes: int, link: Link, workers: int) -> int:
    """How many streams a mean of so many bytes is worth, on a link as measured by two or more workers.

    None that would have less than `LEAST_STREAM` bytes to send, which its connections take to get up
    to speed, and four times as many as fill the link at the most: its rate is measured by one
    connection that has just begun, on long links too low.
    """
    # A message of gloo takes a round trip: it asks before it sends.
    rtt_s = link.latency_s
    if rtt_s <= NEAR_S:
        return 1
    sent = 2 * (workers - 1) / workers * nbytes
    filling = math.ceil(min(link.bandwidth_gbit_s * 1e9 / 8 * rtt_s / PER_ROUND_TRIP, MOST))
    return max(1, min(MOST_CHOSEN, 4 * filling, int(sent / LEAST_STREAM)))


def mean_s(nbytes: float, link: Link, workers: int, streams: int) -> float:
    """Seconds of a mean over gloo and TCP: as on a ring, but at most so many bytes a round trip.

    T = 2 (n-1) latency + max(sent / rate, sent / (streams PER_ROUND_TRIP) latency), sent = 2 (n-1)/n bytes; a message of gloo takes a round trip, since it asks before it sends.
    """
    sent = 2 * (workers - 1) / workers * nbytes
    round_trips = sent / (streams * PER_ROUND_TRIP)
    on_the_way = max(sent * 8 / (link.bandwidth_gbit_s * 1e9), round_trips * link.latency_s)
    return 2 * (workers - 1) * link.latency_s + on_the_way


def spans(numel: int, nbytes: int, streams: int, *, least: int = _LEAST_PART) -> list[slice]:
    """The parts of a message, of near equal size, none of which is below `least` bytes; at least one."""
    count = max(1, min(streams, numel, nbytes // least if least else streams))
    ends = [numel * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def open_files() -> int | None:
    """Of this process; None where the system does not tell."""
    return len(list(_FILES.iterdir())) if _FILES.is_dir() else None


def affordable(per_stream: int) -> int:
    """How many streams this process's limit of open files allows, beside what is open now.

    Args:
        per_stream: files of one more stream.
    """
    now = open_files()
    if now is None or per_stream < 1:
        return MOST
    # Not on all systems, but where files can be counted.
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return MOST
    return max(1, min(MOST, 1 + (limit - now - _SPARE_FILES) // per_stream))


@final
class PartsHandle(TimedHandle):
    """A message under way in parts; over when all are, failed when one has.

    Args:
        parts: the collectives.
        buffer: where the result will be.
        put: called once all parts are there, to bring them into the buffer; None: they are.
    """

    def __init__(
        self,
        parts: Sequence[TimedHandle],
        buffer: Tensor,
        put: Callable[[], object] | None = None,
    ) -> None:
        super().__init__(buffer, now=parts[0].launched_at)
        self._parts = list(parts)
        self._put = put

    def poll(self) -> None:
        """Note the end of the last one."""
        if self.finished_at is None:
            for part in self._parts:
                part.poll()
            self.look(all(part.finished_at is not None for part in self._parts))

    def _wait(self, timeout_s: float) -> None:
        limit = time.perf_counter() + timeout_s
        parts = self._parts
        self._parts = []
        try:
            while parts:
                # A little where nothing is left, since gloo takes 0 for its default.
                parts.pop(0).wait(max(1e-3, limit - time.perf_counter()))
        finally:
            # Peers hear of a failure only when nobody holds the other parts any more, as an exception's
            # traceback would.
            parts.clear()
        if self._put is not None:
            self._put()
