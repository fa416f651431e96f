"""The workers of a run.

How they meet, agree to stop, and speak outside of the training's own communication.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # public, but not marked so

from distoptim import checks
from distoptim.comm import emulate
from distoptim_experiments.config import RunConfig

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Meeting:
    """Where the workers of a run find each other: a store's host and port, this worker's rank, and
    how many there are.

    Args:
        host, port: of a TCPStore.
        rank: in [0, size).
        size: number of workers.
        prefix: of the keys in the store, so that a second attempt does not find the first one's
            addresses.
        hosted: whether somebody else (a parent, torchrun's agent) serves the store; otherwise rank
            0 does.
    """

    host: str
    port: int
    rank: int
    size: int
    prefix: str = ""
    hosted: bool = True

    def connect(self, timeout_s: float) -> Store:
        """The store; it may be used for one run after another, with a prefix for each."""
        store: Store = TCPStore(
            self.host,
            self.port,
            self.size,
            timeout=timedelta(seconds=timeout_s),
            is_master=not self.hosted and self.rank == 0,
            wait_for_workers=False,
        )
        return PrefixStore(self.prefix, store) if self.prefix else store


def from_torchrun() -> Meeting | None:
    """What torchrun (or whoever sets the same variables) says; None if nobody does.

    Raises:
        ValueError: only some of the variables are set, or they are not numbers.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"RANK and WORLD_SIZE are set, MASTER_ADDR and MASTER_PORT are not: {error}"
        ) from error
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    # A store of the workers' own is new at every attempt; and the agents of several hosts count
    # attempts differently.
    attempt = f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}" if hosted else ""
    return Meeting(host, port, rank, size, attempt, hosted)


def workers_of(ranks: int, island_size: int) -> int:
    """How many workers so many ranks are.

    Raises:
        ValueError: the size of an island does not divide their number.
    """
    if ranks % checks.integer("island_size", island_size, 1):
        raise ValueError(
            f"island_size={island_size} with {ranks} ranks: allowed is a number that divides it"
        )
    return ranks // island_size


class World:
    """This rank's place, and a private gloo group for small messages that the emulated link does
    not slow down.

    Attributes:
        rank, size: among all ranks.
        worker, workers: which worker this rank is, or is part of, and how many there are.
        place, island_size: among the ranks of its worker.
    """

    def __init__(self, island_size: int = 1) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.workers, self.island_size = workers_of(self.size, island_size), island_size
        self.worker, self.place = divmod(self.rank, island_size)
        self.control = dist.new_group(backend="gloo")

    def barrier(self) -> None:
        """Wait for all."""
        dist.barrier(self.control)

    def gather(self, message: object) -> list[Any]:
        """Everybody's message, in rank order."""
        messages: list[Any] = [None] * self.size
        dist.all_gather_object(messages, message, group=self.control)
        return messages


@contextlib.contextmanager
def joined(meeting: Meeting, config: RunConfig, store: Store | None = None) -> Iterator[World]:
    """Within the block torch.distributed runs, over the emulated link if the run has one.

    Args:
        meeting: where the workers find each other.
        config: the run.
        store: of the meeting, if there is a connection already; nothing of an earlier run may be in
            it.
    """
    timeout = timedelta(seconds=config.timeout_s)
    store = meeting.connect(config.timeout_s) if store is None else store
    link = config.link
    backend = (
        "gloo"
        if link is None
        else emulate(latency_s=link.latency_s, bandwidth_gbit_s=link.bandwidth_gbit_s)
    )
    dist.init_process_group(
        backend, store=store, rank=meeting.rank, world_size=meeting.size, timeout=timeout
    )
    yield World(config.island_size)
    # Not after an exception: peers may be anywhere, and this process is about to end.
    dist.destroy_process_group()


class StopSignals:
    """Notes SIGINT and SIGTERM instead of dying from them, within a `with` block of the main thread."""

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> StopSignals:
        """Take over."""
        self._before = {s: signal.signal(s, self._note) for s in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Give back."""
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum


class StopVote:
    """Lets all workers stop after the same step when one was told to.

    An all-reduce (maximum) of [signal, seconds per step, whether the run can go on] travels in the
    background and is read some steps later, about four times a second at the slowest worker's pace:
    nobody waits for it.
    """

    def __init__(self, world: World, signals: StopSignals) -> None:
        self._world, self._signals = world, signals
        self._due = 1
        self._ballot: torch.Tensor | None = None
        self._work: Any = None

    def verdict(self, steps: int, step_s: float, goes_on: bool) -> int:
        """The signal for which all stop now, or 0.

        Args:
            steps: local steps made since the start of this process, equal on all workers.
            step_s: seconds a step takes here.
            goes_on: whether the run could, for all that this worker knows (see `methods.goes_on`).

        Raises:
            FloatingPointError: on all workers: no one's could.
        """
        if steps < self._due:
            return 0
        signum, pace, alive = self._read()
        if signum:
            return signum
        if not alive:
            raise FloatingPointError("no worker's loss is finite")
        self._due = steps + (max(1, min(1000, round(0.25 / pace))) if pace else 1)
        self._ballot = torch.tensor([self._signals.received, step_s, goes_on], dtype=torch.float64)
        self._work = dist.all_reduce(
            self._ballot, dist.ReduceOp.MAX, self._world.control, async_op=True
        )
        return 0

    def close(self) -> int:
        """Read the last vote, so that nothing is in flight; returns its signal."""
        return self._read()[0]

    def _read(self) -> tuple[int, float, bool]:
        if self._work is None or self._ballot is None:
            return 0, 0.0, True
        self._work.wait()
        self._work = None
        return int(self._ballot[0]), float(self._ballot[1]), bool(self._ballot[2])
