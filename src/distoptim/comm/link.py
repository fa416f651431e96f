"""An emulated slow link.

A torch.distributed backend that is gloo, but takes the time a link would.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distoptim import checks
from distoptim.comm import emulated as cable
from distoptim.comm.emulated import TimedWork

BACKEND = "emulated"


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


def emulate(*, latency_s: float, bandwidth_gbit_s: float) -> str:
    """Set up the backend "emulated" and return its name, to be passed to `init_process_group`.

    All-reduce, all-gather, all-to-all and broadcast take the time of `Link`, from the arrival of
    the last worker on, one after the other per worker as on one cable, and without using the
    processor meanwhile; results appear when that time is over. Other collectives run at gloo's own
    speed. DDP, comm hooks and new groups work on top. A second call changes the link of a running
    job. Workers must be on one machine, since they compare clocks.

    Args:
        latency_s: seconds one message takes, >= 0.
        bandwidth_gbit_s: each worker's rate in Gbit/s, > 0.

    Raises:
        ValueError: a value outside its range.
    """
    global _link
    _link = Link(latency_s, bandwidth_gbit_s)
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, EmulatedGroup, devices=["cpu"])
    return BACKEND


_link = Link(0.0, math.inf)

# torch's stubs know neither the constructors nor the methods that a Python process group overrides.
_c10d: Any = dist


def _by_gloo(name: str) -> Callable[..., dist.Work]:
    """A collective that takes no time on the link.

    Left to torch, it would call gloo with the interpreter lock held and there wait for a lock whose
    holder, gloo's thread, may be waiting for the interpreter's to free a tensor.
    """

    def collective(group: EmulatedGroup, *args: Any, **kwargs: Any) -> dist.Work:
        work: dist.Work = getattr(group._gloo, name)(*args, **kwargs)
        return work

    return collective


class EmulatedGroup(_c10d.ProcessGroup):  # type: ignore[misc]  # see above
    """gloo with the emulated link between its workers; made by torch.distributed."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = _c10d.ProcessGroupGloo(store, rank, size, timeout)
        # Its own connections: the thread below is not to come between the collectives of the
        # program's.
        self._timed = _c10d.ProcessGroupGloo(_c10d.PrefixStore("timed", store), rank, size, timeout)
        self._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, self._gloo)
        self._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        self._timeout = timeout
        self._items = cable.serve(self)
        self._latest: deque[TimedWork] = deque(maxlen=8)

    def getBackendName(self) -> str:
        """The name under which torch.distributed knows it."""
        return BACKEND

    allreduce_coalesced = _by_gloo("allreduce_coalesced")
    barrier = _by_gloo("barrier")
    reduce_scatter = _by_gloo("reduce_scatter")
    send = _by_gloo("send")
    recv = _by_gloo("recv")

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        """All-reduce in place, in the time of the link."""
        opts = opts or _c10d.AllreduceOptions()
        return self._send(tensors, lambda t: self._timed.allreduce(t, opts), _link.all_reduce_s)

    def allgather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        """All-gather in the time of the link: everybody's bytes go round the ring."""
        return self._send(
            outputs[0],
            lambda t: self._timed.allgather([t], inputs),
            lambda nbytes, workers: _link.broadcast_s(nbytes / workers, workers),
        )

    def alltoall_base(self, output: Tensor, given: Tensor, *splits_and_options: Any) -> dist.Work:
        """All-to-all of rows in the time of the link: everybody sends all but the own one."""
        return self._send(
            [output],
            lambda t: self._timed.alltoall_base(t[0], given, *splits_and_options),
            lambda nbytes, workers: _link.broadcast_s(nbytes / workers, workers),
        )

    def broadcast(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        """Broadcast in place, in the time of the link."""
        return self._send(tensors, lambda t: self._timed.broadcast(t, opts), _link.broadcast_s)

    def _send(
        self,
        tensors: list[Tensor],
        collective: Callable[[list[Tensor]], dist.Work],
        seconds: Callable[[float, int], float],
    ) -> dist.Work:
        nbytes = sum(t.numel() * t.element_size() for t in tensors)
        work = TimedWork(self._timeout)

        def run() -> None:
            arrived = self._latest_of(time.monotonic())
            # On copies: nobody is to see the result before the link could have brought it.
            copies = [t.detach().clone() for t in tensors]
            collective(copies).wait()
            over = self._latest_of(cable.book(arrived, seconds(nbytes, self.size())))
            time.sleep(max(0.0, over - time.monotonic()))
            with torch.no_grad():
                torch._foreach_copy_(tensors, copies)

        # DDP waits for it in C++, where torch 2.6 does not hold the Python object: a crash or a
        # hang.
        self._latest.append(work)
        self._items.put((work, run, tensors))
        return work

    def _latest_of(self, moment: float) -> float:
        """The latest of all workers' moments."""
        latest = torch.tensor([moment], dtype=torch.float64)
        options = _c10d.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX
        self._timed.allreduce([latest], options).wait()
        return latest.item()
