"""The simulator's communicator: buffers of all virtual workers, and a virtual clock for each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from distoptim.comm import Communicator, Handle, MeanLost
from distoptim.simulator.network import Network


@dataclass
class Collective:
    """What all join: who has brought what, when it ends (None before the last has arrived), and why not well."""

    brought: dict[int, Any] = field(default_factory=dict)
    arrived_at: float = 0.0
    ends_at: float | None = None
    failure: MeanLost | None = None


class Line:
    """Collectives that the workers join in one order: each worker's i-th call is the i-th one."""

    def __init__(self, workers: int) -> None:
        self._collectives: list[Collective | None] = []
        self._joined = [0] * workers

    def join(self, rank: int, brought: Any, at: float) -> Collective:
        """Worker `rank` joins its next one at a virtual time, with what it brings."""
        index = self._joined[rank]
        self._joined[rank] += 1
        if index == len(self._collectives):
            self._collectives.append(Collective())
        collective = self._collectives[index]
        assert collective is not None
        collective.brought[rank] = brought
        collective.arrived_at = max(collective.arrived_at, at)
        if len(collective.brought) == len(self._joined):
            # All have come: nobody will ask for it here again.
            self._collectives[index] = None
        return collective


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
        self._means = Line(workers)
        # Second stages have connections of their own: each worker starts them at another place
        # among its means.
        self._second = Line(workers)
        self._broadcasts: list[Tensor] = []

    def arrive(
        self,
        rank: int,
        brought: Any,
        buffer: Tensor,
        move: Callable[[list[Any]], float],
        *,
        after: VirtualHandle | None = None,
        share: float = 1.0,
        first_stage: bool = False,
    ) -> VirtualHandle:
        """Worker `rank` joins its next collective.

        Args:
            rank: the worker.
            brought: what it comes with.
            buffer: what its handle will hold.
            move: called with what all have brought, in rank order; moves it, and says how many
                bytes an all-reduce of them counts.
            after: the first stage of a mean of which this is the second: it arrives when that ends,
                wherever the worker's clock is.
            share: what part of that all-reduce's time it takes.
            first_stage: of a mean, for which no worker's clock stands still.
        """
        at = self.clocks[rank] if after is None else after.end()
        line = self._means if after is None else self._second
        collective = line.join(rank, brought, at)
        if len(collective.brought) == self.workers:
            nbytes = move([collective.brought[r] for r in range(self.workers)])
            cost = share * self.cost_s(nbytes, self.workers)
            collective.ends_at = max(collective.arrived_at, self.free_at) + cost
            self.free_at = collective.ends_at
            collective.brought = {}
        return VirtualHandle(self, rank, buffer, collective, at=at, stops_clock=not first_stage)

    def cost_s(self, nbytes: float, workers: int) -> float:
        """Seconds of an all-reduce of so many bytes among so many workers."""
        if self._network is None:
            return 0.0
        return self._network.all_reduce_s(nbytes * self._scale, workers)

    def in_flight(
        self,
        rank: int,
        buffer: Tensor,
        launched_at: float,
        ends_at: float,
        workers: int | None = None,
    ) -> VirtualHandle:
        """A mean from a checkpoint, of so many workers.

        Its value is in the buffer already, its time is still to come.
        """
        handle = VirtualHandle(self, rank, buffer, Collective(ends_at=ends_at), at=launched_at)
        handle.workers = workers
        return handle

    def broadcast(self, rank: int, count: int, buffer: Tensor) -> None:
        """Worker 0 leaves its buffer, the others take it; free of charge."""
        if count == len(self._broadcasts):
            self._broadcasts.append(buffer.clone())
        buffer.copy_(self._broadcasts[count])


def average(buffers: list[Tensor]) -> float:
    """Put the mean in the place of each; returns the bytes of one."""
    total = buffers[0].clone()
    for buffer in buffers[1:]:
        total.add_(buffer)
    total.div_(len(buffers))
    torch._foreach_copy_(buffers, [total] * len(buffers))
    return total.nbytes


def gather(brought: list[tuple[Tensor, Tensor]]) -> float:
    """Of pairs (own, everybody's): all own ones into the second of each; returns the bytes of all own ones."""
    rows = torch.stack([own for own, _ in brought])
    torch._foreach_copy_([everybody for _, everybody in brought], [rows] * len(brought))
    return rows.nbytes


def swap(brought: list[tuple[Tensor, Tensor]]) -> float:
    """Of pairs (rows, received): row i of all into the second of pair i; returns the bytes of one's rows."""
    for rank, (_, received) in enumerate(brought):
        received.copy_(torch.stack([rows[rank] for rows, _ in brought]))
    return brought[0][0].nbytes


@final
class VirtualHandle(Handle):
    """A collective of virtual workers; its clock is its worker's virtual one.

    Args:
        fabric: whose clocks.
        rank: the worker.
        buffer: where the result will be.
        collective: what was joined.
        at: the virtual time of the launch.
        stops_clock: the worker that waits for it stands still until it has ended. Nobody does for a
            first stage: what follows it is done beside the computation.
    """

    def __init__(
        self,
        fabric: Fabric,
        rank: int,
        buffer: Tensor,
        collective: Collective,
        *,
        at: float,
        stops_clock: bool = True,
    ) -> None:
        super().__init__(buffer, now=at)
        self._fabric = fabric
        self._rank = rank
        self._collective = collective
        self._stops_clock = stops_clock

    @property
    def ends_at(self) -> float | None:
        """When the result is there, in virtual time; None before the last worker has arrived."""
        return self._collective.ends_at

    @property
    def is_there(self) -> bool:
        """Whether all have arrived, and nobody was lost meanwhile."""
        return self.ends_at is not None and self._collective.failure is None

    def end(self) -> float:
        """`ends_at` of one that all have joined.

        Raises:
            RuntimeError: not all have.
        """
        if self.ends_at is None:
            raise RuntimeError(
                "a virtual worker waits for one that has not launched: run them in lockstep"
            )
        return self.ends_at

    def poll(self) -> None:
        """Note the end of a first stage as soon as all have brought theirs, whatever the clocks say:
        its second stage arrives at that end, not at the time of the call."""
        if not self._stops_clock:
            self.finished_at = self.ends_at

    def wait(self, timeout_s: float) -> None:
        """Advance the worker's clock to the end of the collective if it is not there yet.

        Raises:
            MeanLost: a worker was lost before that end.
        """
        ends_at = self.end()
        if not self._fabric.frozen:
            self._stand_still(ends_at)
        if self._collective.failure is not None:
            raise self._collective.failure

    def _stand_still(self, ends_at: float) -> None:
        now = self._fabric.clocks[self._rank]
        self.finished_at = ends_at
        if not self._stops_clock:
            self.waited_s = 0.0
            return
        self.waited_s = (self.waited_s or 0.0) + max(0.0, ends_at - now)
        self._fabric.clocks[self._rank] = max(now, ends_at)


class VirtualCommunicator(Communicator):
    """Worker `rank` of a fabric."""

    in_lockstep = True

    def __init__(self, fabric: Fabric, rank: int) -> None:
        self.rank = rank
        self.size = fabric.workers
        self._fabric = fabric
        self._broadcasts = 0

    def now(self) -> float:
        """The worker's virtual clock."""
        return self._fabric.clocks[self.rank]

    def all_reduce(self, buffer: Tensor) -> Handle:
        """Hand in a buffer; the mean is there when all workers have."""
        return self._fabric.arrive(self.rank, buffer, buffer, average)

    def all_gather(self, output: Tensor, input: Tensor, *, after: Handle | None = None) -> Handle:
        """Join the next mean with a code, or a second stage.

        On a ring an all-gather of n codes sends the bytes of an all-reduce of half of them together.
        """
        if after is None:
            return self._fabric.arrive(
                self.rank, (input, output), output, lambda brought: gather(brought) / 2
            )
        if not isinstance(after, VirtualHandle):
            raise ValueError(f"after={after!r}: allowed is a handle of this communicator")
        return self._fabric.arrive(
            self.rank, (input, output), output, gather, after=after, share=0.5
        )

    def all_to_all(self, output: Tensor, input: Tensor) -> Handle:
        """Join the next mean with codes; half of an all-reduce, as its second stage is the other."""
        return self._fabric.arrive(
            self.rank, (input, output), output, swap, share=0.5, first_stage=True
        )

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """Take what worker 0 left; another source is never asked for, see `all_gather_json`."""
        self._fabric.broadcast(self.rank, self._broadcasts, buffer)
        self._broadcasts += 1

    def all_gather_json(self, message: object, *, what: str = "") -> list[object]:
        """The own message for everybody's: workers of one process agree by construction."""
        return [json.loads(json.dumps(message)) for _ in range(self.size)]
