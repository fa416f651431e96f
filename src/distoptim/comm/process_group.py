"""Means over a torch.distributed process group: gloo or nccl, or any backend that has all_reduce."""

from __future__ import annotations

import atexit
import contextlib
import gc
import inspect
import os
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distoptim.comm import control
from distoptim.comm.communicator import CommunicationError, Communicator, SingleWorker
from distoptim.comm.cuda import NcclHandle, Staging
from distoptim.comm.emulated import BACKEND, EmulatedGroup
from distoptim.comm.handles import Handle, TimedHandle, WorkHandle

# Whose options of one collective have no types.
_c10d: Any = dist.distributed_c10d

# How many communicators over these ranks this process has made; in step with the other members'.
_made: Counter[tuple[int, ...]] = Counter()
_open: weakref.WeakSet[ProcessGroupCommunicator] = weakref.WeakSet()
# Groups of communicators that nobody holds any more.
_forgotten: list[dict[str, Any]] = []
# Of so many more open communicators than when it was last looked for, some may be garbage in circles.
# Looking costs tenths of a second in a large program, so not at every construction.
_MANY = 8
_looked_at = 0


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Workers in `group` (default: all), 1 where torch.distributed is not initialised."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def forgotten() -> int:
    """How many processes torchrun has started, where torch.distributed is not initialised; else 0."""
    if dist.is_available() and dist.is_initialized():
        return 0
    started = os.environ.get("WORLD_SIZE", "")
    return int(started) if started.isdecimal() and int(started) > 1 else 0


def ranks_of(group: dist.ProcessGroup) -> list[int]:
    """The ranks of a group's members among all; a group that this rank is not in has none."""
    return dist.get_process_group_ranks(group) if dist.get_rank(group) >= 0 else []


def connect(group: dist.ProcessGroup | None = None, timeout_s: float = 1800.0) -> Communicator:
    """A communicator over `group` (None: all workers); collective in it.

    With one worker, or no process group, one that is alone.
    """
    if world_size(group) > 1:
        return ProcessGroupCommunicator(group, timeout_s=timeout_s)
    warnings.warn(
        "one worker: there is nobody to average with (is torch.distributed initialised, before the "
        "optimizer is made?)",
        RuntimeWarning,
        stacklevel=_users_level(),
    )
    return SingleWorker()


def _users_level() -> int:
    """Of the line that called into this package, as `warnings.warn` counts from our caller.

    `skip_file_prefixes` of warnings.warn says the same from Python 3.12 on.
    """
    package = Path(__file__).parents[1]
    frame = inspect.currentframe()
    # Our own frame and those below the user's: how many there are depends on the algorithm.
    level = 0
    while frame is not None and package in Path(frame.f_code.co_filename).parents:
        frame = frame.f_back
        level += 1
    return level


class ProcessGroupCommunicator(Communicator):
    """Private groups over the ranks of `group`: one for means, one (gloo) for control data, one for
    second stages of coded means.

    Control data behind large buffers in the same gloo group would wait for them; second stages have
    an order of their own (see `Stages`).

    Making it is collective over the members of `group`, since all three groups are made at once: a
    group that is made in mid-training needs the store, whose host may be gone by then, and whoever
    waits for it does so for ever. So is unpickling it.

    Args:
        group: the workers; None means all.
        timeout_s: bound of every wait, in seconds; torch's own default of 30 minutes.

    Raises:
        CommunicationError: not all members made theirs in time.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, timeout_s: float = 1800.0
    ) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._ranks = None if group is None else dist.get_process_group_ranks(group)
        self._timeout = timedelta(seconds=timeout_s)
        self._limit = self._timeout
        self._backends = _backends(group)
        self._averages = {kind: _averages(backend) for kind, backend in self._backends.items()}
        self._staging: Staging | None = None
        # A torch ProcessGroup, or one of its backends.
        self._groups: dict[str, Any] = {}
        _leave_forgotten()
        # Not left there and then: garbage is collected in any thread, at other times on every worker,
        # and leaving a group waits for its threads.
        self._finalizer = weakref.finalize(self, _forgotten.append, self._groups)
        self._finalizer.atexit = False
        _made[tuple(self.ranks)] += 1
        with self._one_error("the making of groups"):
            self._make("means", str(dist.get_backend(group)))
            self._make("control data", "gloo")
            if "cpu" in self._backends:
                # Codes are in host memory. Over nccl alone there are none.
                self._make("second stages", self._backends["cpu"])
        _open.add(self)

    @property
    def ranks(self) -> list[int]:
        """The workers' ranks among all."""
        return list(range(self.size)) if self._ranks is None else self._ranks

    def begin_round(self, due_in_s: float = 0.0) -> None:
        """Let the next means wait for late workers until they are due, and `timeout_s` from there.

        gloo counts from the launch.
        """
        self._limit = self._timeout + timedelta(seconds=2 * due_in_s)

    def all_reduce(self, buffer: Tensor) -> Handle:
        """Start the mean of `buffer`.

        CUDA over a gloo group goes through pinned host memory.
        """
        if not buffer.is_cuda:
            return self._all_reduce(buffer, WorkHandle)
        if self._nccl:
            return self._all_reduce(buffer, NcclHandle)
        if self._staging is None:
            self._staging = Staging(lambda host: self._all_reduce(host, WorkHandle))
        return self._staging.launch(buffer)

    def all_gather(self, output: Tensor, input: Tensor, *, after: Handle | None = None) -> Handle:
        """Start the all-gather of `input` into the rows of `output`; host memory only."""
        group = self._group("means" if after is None else "second stages")
        options = _c10d.AllgatherOptions()
        options.timeout = self._limit
        return WorkHandle(group.allgather([list(output.unbind(0))], [input], options), output)

    def all_to_all(self, output: Tensor, input: Tensor) -> Handle:
        """Start the all-to-all of rows; host memory only."""
        options = _c10d.AllToAllOptions()
        options.timeout = self._limit
        work = self._group("means").alltoall_base(output, input, [], [], options)
        return WorkHandle(work, output)

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """Replace `buffer` by that of the group's rank `source`.

        Host memory goes over gloo always.
        """
        group = self._group("control data" if self._nccl and not buffer.is_cuda else "means")
        host = buffer.cpu() if buffer.is_cuda and not self._nccl else buffer
        with self._one_error(f"a broadcast from rank {source}"):
            options = _c10d.BroadcastOptions()
            options.rootRank = source
            group.broadcast([host], options).wait()
        if host is not buffer:
            buffer.copy_(host)

    def all_gather_json(self, message: object, *, what: str = "") -> list[object]:
        """Everybody's message, in rank order, over the group for control data."""
        with self._one_error(what or "a message without a name"):
            return control.all_gather_json(message, self._group("control data"), what=what)

    def close(self) -> None:
        """Leave the groups; gloo then ends what is in flight, or gives it up at the timeout."""
        self.stages.queue.clear()
        _open.discard(self)
        self._finalizer.detach()
        _leave(self._groups)

    def __deepcopy__(self, memo: dict[int, object]) -> ProcessGroupCommunicator:
        """A copied optimizer talks over the same groups."""
        return self

    def __reduce__(self) -> tuple[object, ...]:
        """Unpickled in another program, it talks to all the workers of that one."""
        if self._ranks is not None:
            raise TypeError(
                "an optimizer with a process group of its own (group=...) cannot be pickled"
            )
        return connect, (None, self._timeout.total_seconds())

    @property
    def _nccl(self) -> bool:
        return self._backends.get("cuda") == "nccl"

    def _group(self, use: str) -> Any:
        if use not in self._groups:
            why = "nccl carries no codes" if self._groups else "this communicator has been closed"
            raise CommunicationError(f"no group for {use}: {why}")
        return self._groups[use]

    def _make(self, use: str, backend: str) -> None:
        """Make a group of our own.

        Where we can, past `dist.new_group`: it names groups of some ranks after how many groups there
        are in this process, so that one that was left anywhere would make the next one's members look
        for each other under different names, or find addresses where nobody listens any more.
        """
        make = {"gloo": dist.ProcessGroupGloo, BACKEND: EmulatedGroup}.get(backend)
        if make is None:
            local = self._ranks is not None
            self._groups[use] = dist.new_group(
                self._ranks, timeout=self._timeout, backend=backend, use_local_synchronization=local
            )
            return
        ranks = tuple(self.ranks)
        name = f"distoptim/{'_'.join(map(str, ranks))}/{_made[ranks]}/{use}"
        # torch has no public way to the store; `new_group` takes it from there too.
        store = _c10d.PrefixStore(name, _c10d._get_default_store())  # noqa: SLF001
        self._groups[use] = make(store, self.rank, self.size, self._timeout)

    def _one_error(self, what: str) -> contextlib.AbstractContextManager[None]:
        limit = self._timeout.total_seconds()
        return control.one_error(f"rank {self.rank}: {what} (timeout {limit:g} s)", self.close)

    def _all_reduce(
        self, buffer: Tensor, handle: Callable[[dist.Work, Tensor, int], TimedHandle]
    ) -> TimedHandle:
        average = self._averages.get(buffer.device.type, False)
        # torch.distributed.all_reduce knows no timeout of one collective.
        options = _c10d.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.AVG if average else dist.ReduceOp.SUM
        options.timeout = self._limit
        work = (self._groups.get("means") or self._group("means")).allreduce([buffer], options)
        return handle(work, buffer, 1 if average else self.size)


def _backends(group: dist.ProcessGroup | None) -> dict[str, str]:
    """Kind of device -> its backend. A group made without naming a backend has several."""
    pairs = [pair.split(":") for pair in str(dist.get_backend_config(group)).split(",")]
    return {pair[0]: pair[1] for pair in pairs}


def _averages(backend: str) -> bool:
    """Whether the backend is known to have ReduceOp.AVG, which saves a division of our own.

    gloo has it from torch 2.8 on, in its background thread; the emulated link is gloo.
    """
    return backend == "nccl" or (backend in ("gloo", "emulated") and torch.__version__ >= "2.8")


def _leave(groups: dict[str, Any]) -> None:
    left = list(groups.values())
    groups.clear()
    if left:
        # Let gloo's threads drop the tensors of what has just ended. They need the interpreter lock
        # for it, and the group's destructor waits for them with the lock held: a deadlock, seen with
        # torch 2.6.
        time.sleep(0.02)
    for group in left:
        # Torch knows those alone that it has made, and no more once the program has destroyed all.
        with contextlib.suppress(ValueError, AssertionError):
            if dist.is_initialized():
                dist.destroy_process_group(group)


def _leave_forgotten() -> None:
    """Leave the groups of optimizers that were dropped without close(): 10 files and 6 threads each."""
    global _looked_at
    _looked_at = min(_looked_at, len(_open))
    if len(_open) >= _looked_at + _MANY:
        gc.collect()
        _looked_at = len(_open)
    while _forgotten:
        _leave(_forgotten.pop())


@atexit.register
def _close_all() -> None:
    """Interpreter exit with a gloo operation in flight aborts the process.

    Leaving the group first does not.
    """
    for communicator in list(_open):
        communicator.close()
    _leave_forgotten()
