"""Means over a torch.distributed process group.

Gloo or nccl, or any backend that has all_reduce.
"""

from __future__ import annotations

import atexit
import contextlib
import time
import weakref
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from distoptim.comm.communicator import Handle, RealHandle
from distoptim.comm.relay import Relay, Relays

if TYPE_CHECKING:
    from distoptim.comm.cuda import Staging

# Groups that were left and whose place in torch's count of groups is free.
_left = 0
_open: weakref.WeakSet[ProcessGroupCommunicator] = weakref.WeakSet()


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Workers in `group` (default: all), 1 where torch.distributed is not initialised."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


class WorkHandle(RealHandle):
    """A collective of the backend; its end is noted at the first `poll` after it.

    A callback on the work's future would note it exactly, but in the backend's thread, which needs
    the
    interpreter lock for it: a training thread that leaves the group at that moment holds the lock
    and waits for the thread (seen with torch 2.6).

    Args:
        work: the collective.
        buffer: where the mean will be.
        divisor: what the collective's result is still to be divided by.
    """

    def __init__(self, work: dist.Work, buffer: Tensor, divisor: int = 1) -> None:
        super().__init__(buffer)
        self.work: dist.Work | None = work
        self._divisor = divisor

    def poll(self) -> None:
        """Note the end."""
        if self.finished_at is None and self.work is not None:
            if self.work.is_completed():
                self.finished_at = time.perf_counter()
            else:
                self.unfinished_at = time.perf_counter()

    def _wait(self, timeout_s: float) -> None:
        # The work is forgotten, since a failure reaches the peers only when nobody holds it.
        work, self.work = self.work, None
        if work is not None:
            self._join(work, timeout_s)
            if self._divisor != 1:
                self.buffer.div_(self._divisor)

    def _join(self, work: dist.Work, timeout_s: float) -> None:
        work.wait(timedelta(seconds=timeout_s))


class ProcessGroupCommunicator:
    """Private groups over the ranks of `group`: one for parameters, one (gloo) for small messages,
    one for relays.

    A small message behind large ones in the same gloo group waits for them; second stages of relays
    have an order of their own. The first two are made at the first use, the third at the first
    relay; these calls are collective.

    Args:
        group: the workers; None means all.
        timeout_s: bound of every wait, in seconds.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, timeout_s: float = 1800.0
    ) -> None:
        self._ranks = None if group is None else dist.get_process_group_ranks(group)
        self._backend = dist.get_backend(group)
        # A group made without naming a backend has one for each kind of device.
        self._nccl = "nccl" in str(dist.get_backend_config(group))
        self._timeout = timedelta(seconds=timeout_s)
        self._groups: list[dist.ProcessGroup] = []
        self._relays: Relays | None = None
        self._averages: dict[torch.device, bool] = {}
        self._staging: Staging | None = None
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    @property
    def ranks(self) -> list[int]:
        """The workers' ranks among all."""
        return list(range(self.size)) if self._ranks is None else self._ranks

    def now(self) -> float:
        """Real time."""
        return time.perf_counter()

    def launch_mean(self, buffer: Tensor) -> Handle:
        """Start the all-reduce of `buffer`.

        CUDA over a gloo group goes through pinned host memory.
        """
        if not buffer.is_cuda:
            return self._all_reduce(buffer, WorkHandle)
        from distoptim.comm.cuda import NcclHandle, Staging

        if self._nccl:
            return self._all_reduce(buffer, NcclHandle)
        if self._staging is None:
            self._staging = Staging(lambda host: self._all_reduce(host, WorkHandle))
        return self._staging.launch(buffer)

    def launch_gather(self, own: Tensor, all_: Tensor) -> Handle:
        """Start the all-gather of `own` into the rows of `all_`; host memory only."""
        group, _ = self._connect()
        return _gather(own, all_, group)

    def launch_relay(self, relay: Relay) -> Handle:
        """Start the all-to-all of the parts, which an all-gather is to follow; host memory only."""
        group, _ = self._connect()
        if self._relays is None:
            second = self._private(self._backend)
            self._groups.append(second)
            self._relays = Relays(partial(_swap, group=group), partial(_gather, group=second))
        return self._relays.launch(relay)

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """Replace `buffer` by that of the group's rank `source`.

        Host memory goes over gloo always.
        """
        group, control = self._connect()
        if self._nccl and not buffer.is_cuda:
            group = control
        host = buffer.cpu() if buffer.is_cuda and not self._nccl else buffer
        dist.broadcast(host, src=dist.get_global_rank(group, source), group=group)
        if host is not buffer:
            buffer.copy_(host)

    def exchange(self, message: object) -> list[object]:
        """Everybody's message, pickled, in rank order."""
        _, control = self._connect()
        messages: list[object] = [None] * self.size
        dist.all_gather_object(messages, message, group=control)
        return messages

    def close(self) -> None:
        """Leave the groups; gloo then ends what is in flight, or gives it up at the timeout."""
        groups, self._groups, self._relays = self._groups, [], None
        _open.discard(self)
        if groups:
            # Let gloo's threads drop the tensors of what has just ended. They need the interpreter
            # lock for it, and the group's destructor waits for them with the lock held: a deadlock,
            # seen with torch 2.6.
            time.sleep(0.02)
        for group in groups:
            global _left
            _left += self._ranks is not None
            # The program may have destroyed all groups before us: ours are gone with them.
            with contextlib.suppress(ValueError, AssertionError):
                if dist.is_initialized():
                    dist.destroy_process_group(group)

    def __deepcopy__(self, memo: dict[int, object]) -> ProcessGroupCommunicator:
        """A copied optimizer talks over the same groups."""
        return self

    def __reduce__(self) -> tuple[object, ...]:
        """Unpickled in another program, it talks to all the workers of that one."""
        if self._ranks is not None:
            raise TypeError(
                "an optimizer with a process group of its own (group=...) cannot be pickled"
            )
        from distoptim.comm import connect

        return connect, (None, self._timeout.total_seconds())

    def _connect(self) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        if not self._groups:
            self._groups = [self._private(self._backend), self._private("gloo")]
            _open.add(self)
        return self._groups[0], self._groups[1]

    def _private(self, backend: str) -> dist.ProcessGroup:
        # Local synchronisation: only the members of an island call this, not the whole world.
        local = self._ranks is not None
        if local:
            _keep_names_apart()
        group: dist.ProcessGroup = dist.new_group(
            self._ranks, timeout=self._timeout, backend=backend, use_local_synchronization=local
        )
        return group

    def _all_reduce(self, buffer: Tensor, handle: type[WorkHandle]) -> WorkHandle:
        group, _ = self._connect()
        if buffer.device not in self._averages:
            self._averages[buffer.device] = _can_average(group, buffer)
        average = self._averages[buffer.device]
        op = dist.ReduceOp.AVG if average else dist.ReduceOp.SUM
        work = dist.all_reduce(buffer, op=op, group=group, async_op=True)
        assert work is not None
        return handle(work, buffer, 1 if average else self.size)


def _gather(own: Tensor, all_: Tensor, group: dist.ProcessGroup) -> WorkHandle:
    work = dist.all_gather(list(all_), own, group=group, async_op=True)
    assert work is not None
    return WorkHandle(work, all_)


def _swap(parts: Tensor, received: Tensor, group: dist.ProcessGroup) -> WorkHandle:
    work = dist.all_to_all_single(received, parts, group=group, async_op=True)
    assert work is not None
    return WorkHandle(work, received)


def _can_average(group: dist.ProcessGroup, like: Tensor) -> bool:
    """Whether the backend's AVG is a mean.

    Gloo has it from torch 2.8 on, in its background thread.
    """
    probe = torch.ones(1, dtype=like.dtype, device=like.device)
    try:
        dist.all_reduce(probe, op=dist.ReduceOp.AVG, group=group)
    except (RuntimeError, ValueError):
        return False
    return probe.item() == 1.0


def _keep_names_apart() -> None:
    """Fill the places of groups that were left with groups of this rank alone.

    Torch names a group after its ranks and the number of groups there are. A second group of the
    same ranks at the same number would find the first one's addresses in the store, where nobody
    listens any more.
    """
    global _left
    while _left > 0:
        dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)
        _left -= 1


@atexit.register
def _close_all() -> None:
    """Interpreter exit with a gloo operation in flight aborts the process.

    Leaving the group first does not.
    """
    for communicator in list(_open):
        communicator.close()
