"""An emulated slow link.

A torch.distributed backend that is gloo, but takes the time a link would: works that end when the
link could have done them, one after the other.
"""

from __future__ import annotations

import atexit
import math
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distoptim.comm.link import Link

BACKEND = "emulated"
EXIT_WAIT_S = 60.0

# torch's stubs know neither the constructors nor the methods that a Python process group and a
# Python work override.
_c10d: Any = dist
_link = Link(0.0, math.inf)


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
        self._items = _serve_queue(self)
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
            over = self._latest_of(_book(arrived, seconds(nbytes, self.size())))
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


class TimedWork(_c10d.Work):  # type: ignore[misc]  # a class without types
    """A collective on the emulated link."""

    def __init__(self, timeout: timedelta) -> None:
        super().__init__()
        self._timeout = timeout
        self._over = threading.Event()
        self._error: str | None = None
        self._future: torch.futures.Future[list[Tensor]] = torch.futures.Future()

    def end(self, tensors: list[Tensor], error: str | None) -> None:
        """Tell those who wait."""
        self._error = error
        self._over.set()
        if error is None:
            self._future.set_result(tensors)
        else:
            self._future.set_exception(RuntimeError(error))  # type: ignore[arg-type]  # torch takes any exception

    def is_completed(self) -> bool:
        """Whether it ended, well or not."""
        return self._over.is_set()

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until it ended; raises RuntimeError if it failed or did not end in time."""
        limit = timeout or self._timeout
        if not self._over.wait(limit.total_seconds()):
            raise RuntimeError(
                f"collective on the emulated link timed out after {limit.total_seconds():g} s"
            )
        if self._error is not None:
            raise RuntimeError(self._error)
        return True

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        """Completed by the link's thread."""
        return self._future


_Item = tuple[TimedWork, Callable[[], None], list[Tensor]] | None
# This process's queues and the threads that serve them.
_serving: list[tuple[queue.SimpleQueue[_Item], threading.Thread]] = []
_lock = threading.Lock()
_free_at = 0.0


def _serve_queue(group: object) -> queue.SimpleQueue[_Item]:
    """A queue served, first in, first out, by a thread that mostly sleeps and ends with the group.

    One for each group, as gloo has: with one for all, two workers that launch over two groups in
    different order would wait for each other.
    """
    items: queue.SimpleQueue[_Item] = queue.SimpleQueue()
    server = threading.Thread(target=_serve, args=(items,), name="emulated-link", daemon=True)
    server.start()
    if not _serving:
        atexit.register(_drain)
    _serving[:] = [(q, t) for q, t in _serving if t.is_alive()] + [(items, server)]
    weakref.finalize(group, items.put, None)
    return items


def _book(start: float, seconds: float) -> float:
    """Take the worker's cable for some seconds, from `start` or, if it is taken, later.

    Returns the end.
    """
    global _free_at
    with _lock:
        _free_at = max(start, _free_at) + seconds
        return _free_at


def _drain() -> None:
    """At the program's end: exiting in the middle of a gloo operation would abort the process."""
    limit = time.monotonic() + EXIT_WAIT_S
    for items, _ in _serving:
        items.put(None)
    for _, server in _serving:
        server.join(max(0.0, limit - time.monotonic()))


def _serve(items: queue.SimpleQueue[_Item]) -> None:
    while (item := items.get()) is not None:
        work, run, tensors = item
        error: str | None = None
        try:
            run()
        except Exception as failure:  # noqa: BLE001  # raised again where it is waited for
            error = str(failure)
        work.end(tensors, error)
        # Peers hear of a failure only when nobody holds the group any more.
        del item, work, run, tensors
