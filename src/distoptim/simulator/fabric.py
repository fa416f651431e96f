"""The simulator's communicator: buffers of all virtual workers, and a virtual clock for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distoptim.comm import Handle
from distoptim.comm.relay import Relay
from distoptim.simulator.network import Network


@dataclass
class Collective:
    """What all join: who has brought what, and when it ends (None before the last has arrived)."""

    brought: dict[int, Any] = field(default_factory=dict)
    arrived_at: float = 0.0
    ends_at: float | None = None


class Fabric:
    """What the virtual workers share.

    While it is frozen, waiting takes no time and leaves no trace: for checkpoints.

    A collective begins when its last worker has arrived and the one before it has ended (one FIFO),
    and takes what the network says. A worker's clock stands still for it only if it is not over at
    the merge.

    Args:
        workers: how many.
        network: what a mean costs; None: nothing.
        scale: a byte of payload counts as so many, to time a large model with a small one.
    """

    def __init__(self, workers: int, network: Network | None = None, *, scale: float = 1.0) -> None:
        self.workers = workers
        self.clocks = [0.0] * workers
        self._network = network
        self._scale = scale
        self.free_at = 0.0
        self.frozen = False
        self._collectives: list[Collective | None] = []
        self._launched = [0] * workers
        self._broadcasts: list[Tensor] = []

    def arrive(
        self, rank: int, brought: Any, buffer: Tensor, move: Callable[[list[Any]], float]
    ) -> VirtualHandle:
        """Worker `rank` joins its next collective.

        Args:
            rank: the worker.
            brought: what it comes with.
            buffer: what its handle will hold.
            move: called with what all have brought, in rank order; moves it, and says of how many
                bytes an all-reduce would send as much.
        """
        index = self._launched[rank]
        self._launched[rank] += 1
        if index == len(self._collectives):
            self._collectives.append(Collective())
        collective = self._collectives[index]
        assert collective is not None
        collective.brought[rank] = brought
        collective.arrived_at = max(collective.arrived_at, self.clocks[rank])
        if len(collective.brought) == self.workers:
            nbytes = move([collective.brought[r] for r in range(self.workers)])
            cost = (
                self._network.all_reduce_s(nbytes * self._scale, self.workers)
                if self._network is not None
                else 0.0
            )
            self.free_at = collective.ends_at = max(collective.arrived_at, self.free_at) + cost
            collective.brought = {}
            self._collectives[index] = None
        return VirtualHandle(self, rank, buffer, collective)

    def in_flight(
        self, rank: int, buffer: Tensor, launched_at: float, ends_at: float
    ) -> VirtualHandle:
        """A mean from a checkpoint.

        Its value is in the buffer already, its time is still to come.
        """
        handle = VirtualHandle(self, rank, buffer, Collective(ends_at=ends_at))
        handle.launched_at = launched_at
        return handle

    def broadcast(self, rank: int, count: int, buffer: Tensor) -> None:
        """Worker 0 leaves its buffer, the others take it; free of charge."""
        if count == len(self._broadcasts):
            self._broadcasts.append(buffer.clone())
        buffer.copy_(self._broadcasts[count])


def _average(buffers: list[Tensor]) -> float:
    total = buffers[0].clone()
    for buffer in buffers[1:]:
        total.add_(buffer)
    total.div_(len(buffers))
    torch._foreach_copy_(buffers, [total] * len(buffers))
    return total.nbytes


def _gather(brought: list[tuple[Tensor, Tensor]]) -> float:
    rows = torch.stack([own for own, _ in brought])
    torch._foreach_copy_([all_ for _, all_ in brought], [rows] * len(brought))
    # On a ring an all-gather of n codes sends the bytes of an all-reduce of half of them together.
    return rows.nbytes / 2


def _relay(relays: list[Relay]) -> float:
    for rank, relay in enumerate(relays):
        relay.received.copy_(torch.stack([other.parts[rank] for other in relays]))
    for relay in relays:
        relay.between()
    return _gather([(relay.own, relay.all_) for relay in relays]) + relays[0].parts.nbytes / 2


class VirtualHandle(Handle):
    """A mean of virtual workers; its clock is its worker's virtual one."""

    def __init__(self, fabric: Fabric, rank: int, buffer: Tensor, collective: Collective) -> None:
        super().__init__(buffer, now=fabric.clocks[rank])
        self._fabric, self._rank, self._collective = fabric, rank, collective

    @property
    def ends_at(self) -> float | None:
        """When the mean is there, in virtual time; None before the last worker has arrived."""
        return self._collective.ends_at

    def wait(self, timeout_s: float) -> None:
        """Advance the worker's clock to the end of the collective if it is not there yet."""
        ends_at = self.ends_at
        if ends_at is None:
            raise RuntimeError(
                "a virtual worker waits for one that has not launched: run them in lockstep"
            )
        if self._fabric.frozen:
            return
        now = self._fabric.clocks[self._rank]
        self.waited_s = (self.waited_s or 0.0) + max(0.0, ends_at - now)
        self.finished_at = ends_at
        self._fabric.clocks[self._rank] = max(now, ends_at)


class VirtualCommunicator:
    """Worker `rank` of a fabric."""

    def __init__(self, fabric: Fabric, rank: int) -> None:
        self.rank, self.size = rank, fabric.workers
        self._fabric = fabric
        self._broadcasts = 0

    def now(self) -> float:
        """The worker's virtual clock."""
        return self._fabric.clocks[self.rank]

    def launch_mean(self, buffer: Tensor) -> Handle:
        """Join the next collective."""
        return self._fabric.arrive(self.rank, buffer, buffer, _average)

    def launch_gather(self, own: Tensor, all_: Tensor) -> Handle:
        """Join the next collective with a code."""
        return self._fabric.arrive(self.rank, (own, all_), all_, _gather)

    def launch_relay(self, relay: Relay) -> Handle:
        """Join the next collective with codes; its second stage begins when the first ends."""
        return self._fabric.arrive(self.rank, relay, relay.all_, _relay)

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """Take what worker 0 left; another source is never asked for, see `exchange`."""
        self._fabric.broadcast(self.rank, self._broadcasts, buffer)
        self._broadcasts += 1

    def exchange(self, message: object) -> list[object]:
        """The own message: workers of one process agree by construction."""
        return [message]

    def close(self) -> None:
        """Nothing to leave."""
