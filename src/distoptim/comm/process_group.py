"""Means over a torch.distributed process group: gloo or nccl, or any backend that has all_reduce."""

from __future__ import annotations

import atexit
import contextlib
import gc
import inspect
import math
import os
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from functools import partial
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
from distoptim.comm.link import Link
from distoptim.comm.rendezvous import Rendezvous
from distoptim.comm.streams import AUTO, PartsHandle, affordable, choose, mean_s, open_files, spans
from distoptim.comm.streams import check as check_streams

# Whose options of one collective have no types.
_c10d: Any = dist.distributed_c10d

_MAKERS: dict[str, Callable[..., Any]] = {"gloo": dist.ProcessGroupGloo, BACKEND: EmulatedGroup}

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
    """Workers in `group` (default: all), 1 where torch.distributed is not initialised.

    Raises:
        ValueError: it is no process group.
    """
    # Who is not in a group that torch has made holds a number for it.
    if not isinstance(group, dist.ProcessGroup | int | None):
        raise ValueError(f"group={group!r}: allowed is a process group of torch.distributed")
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


def connect(
    group: dist.ProcessGroup | None = None,
    timeout_s: float = 1800.0,
    *,
    streams: int | str = AUTO,
) -> Communicator:
    """A communicator over `group` (None: all workers); collective in it.

    With one worker, or no process group, one that is alone.
    """
    if world_size(group) > 1:
        return ProcessGroupCommunicator(group, timeout_s=timeout_s, streams=streams)
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
        streams: groups at once over which a message in host memory goes in parts, from 1 to 64;
            "auto": as many as round trip and size are worth, once `prepare` has measured them. Over
            nccl 1, since it has channels of its own.

    Raises:
        CommunicationError: not all members made theirs in time; where one dies in the moment in which it
            connects, within two timeouts.
        ValueError: `streams` outside its range.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        timeout_s: float = 1800.0,
        streams: int | str = AUTO,
    ) -> None:
        self._asked = check_streams(streams)
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._ranks = None if group is None else dist.get_process_group_ranks(group)
        self._timeout = timedelta(seconds=timeout_s)
        self._limit = self._timeout
        self._backends = _backends(group)
        self._averages = {kind: _averages(backend) for kind, backend in self._backends.items()}
        self._staging: Staging | None = None
        # How many are open, and for coded means.
        self._streams = 1
        self._second_streams = 1
        self._prepared_for = (0, False)
        self._link: Link | None = None
        self._affordable = 1
        # Bytes and seconds of the largest broadcast so far, and seconds of the fastest control message.
        self._largest = (0, 0.0)
        self._fastest_s = math.inf
        self._groups_made = 0
        # A torch ProcessGroup, or one of its backends.
        self._groups: dict[str, Any] = {}
        _leave_forgotten()
        # Not left there and then: garbage is collected in any thread, at other times on every worker,
        # and leaving a group waits for its threads.
        self._finalizer = weakref.finalize(self, _forgotten.append, self._groups)
        self._finalizer.atexit = False
        _made[tuple(self.ranks)] += 1
        self._number = _made[tuple(self.ranks)]
        before = open_files() or 0
        with self._one_error("the making of groups"):
            wanted = {"means": str(dist.get_backend(group)), "control data": "gloo"}
            if "cpu" in self._backends:
                # Codes are in host memory. Over nccl alone there are none.
                wanted["second stages"] = self._backends["cpu"]
            self._make(wanted)
        self._files = max(1, ((open_files() or 0) - before) // len(self._groups))
        _open.add(self)

    @property
    def ranks(self) -> list[int]:
        """The members' ranks among all."""
        return list(range(self.size)) if self._ranks is None else self._ranks

    @property
    def carries_host_memory(self) -> bool:
        """Not over nccl alone."""
        return "cpu" in self._backends

    def begin_round(self, due_in_s: float = 0.0) -> None:
        """Let the next means wait for late workers until they are due, and `timeout_s` from there.

        gloo counts from the launch.
        """
        self._limit = self._timeout + timedelta(seconds=2 * due_in_s)

    @property
    def link(self) -> Link | None:
        """As measured by `prepare`."""
        return self._link

    def mean_s(self, nbytes: int) -> float:
        """Seconds that a mean should take, as the link was measured; 0 where it was not."""
        return mean_s(nbytes, self._link, self.size, self._streams) if self._link else 0.0

    @property
    def streams(self) -> int:
        """How many are open."""
        return self._streams

    def prepare(self, nbytes: int, *, coded: bool = False) -> None:
        """Open the streams that means of so many bytes are worth, on the link as measured by what was sent so far.

        Blocking and collective: one small message, none where the link is known.

        Args:
            nbytes: of the largest message.
            coded: whether it is of codes, whose second stages have streams of their own.

        Raises:
            ValueError: on all workers: one's limit of open files allows fewer streams than were asked
                for, or nccl is asked for more than one.
        """
        if self.size == 1:
            return
        if "cpu" not in self._backends:
            if self._asked not in (1, AUTO):
                raise ValueError(
                    f"streams={self._asked}: nccl has channels of its own; allowed is 1 or 'auto'"
                )
            return
        if self._link is None:
            self._measure(2 if coded else 1)
            assert self._link is not None
        wanted = self._asked
        if not isinstance(wanted, int):
            chosen = choose(nbytes, self._link, self.size)
            wanted = min(chosen, self._affordable)
        if wanted > self._affordable:
            self.close()
            raise ValueError(
                f"streams={wanted}: the limit of open files of one of the workers allows "
                f"{self._affordable}; raise it (ulimit -n), or take fewer"
            )
        with self._one_error("the making of streams"):
            self._streams = self._widen("means", self._streams, wanted)
            if coded:
                self._second_streams = self._widen("second stages", self._second_streams, wanted)
        self._prepared_for = (nbytes, coded)

    def _widen(self, use: str, count: int, wanted: int) -> int:
        backend = self._backends["cpu"]
        self._make({_stream(use, i): backend for i in range(count, wanted)})
        return max(count, wanted)

    def _measure(self, groups: int) -> None:
        """Round trip and rate, and how many streams of so many groups all can afford."""
        what = "measuring the link"
        if self._fastest_s == math.inf:
            self.all_gather_json(None, what=what)
        own = [*self._largest, self._fastest_s, affordable(groups * self._files)]
        everybody: Any = self.all_gather_json(own, what=what)
        # Who comes last waits for nobody but the link.
        latency_s = min(entry[2] for entry in everybody) / (self.size - 1)
        nbytes = min(entry[0] for entry in everybody)
        seconds = max(entry[1] for entry in everybody)
        # From the first to the last of them the whole message goes over so many links.
        hops = math.ceil(math.log2(self.size))
        transfer_s = max(seconds - hops * latency_s, 1e-6)
        rate = hops * nbytes * 8 / 1e9 / transfer_s if nbytes else math.inf
        self._link = Link(latency_s, rate)
        self._affordable = min(entry[3] for entry in everybody)

    def all_reduce(self, buffer: Tensor) -> Handle:
        """Start the mean of `buffer`.

        CUDA over a gloo group goes through pinned host memory.
        """
        if not buffer.is_cuda:
            if self._streams > 1:
                return self._all_reduce_in_parts(buffer)
            return self._all_reduce(buffer, WorkHandle)
        if self._nccl:
            return self._all_reduce(buffer, NcclHandle)
        if self._staging is None:
            self._staging = Staging(self._all_reduce_in_parts)
        return self._staging.launch(buffer)

    def all_gather(self, output: Tensor, input: Tensor, *, after: Handle | None = None) -> Handle:
        """Start the all-gather of `input` into the rows of `output`; host memory only."""
        use, streams = ("means", self._streams)
        if after is not None:
            use, streams = ("second stages", self._second_streams)
        options = _c10d.AllgatherOptions()
        options.timeout = self._limit
        parts = []
        for i, span in enumerate(self._spans(input, streams)):
            group = self._group(_stream(use, i))
            rows = list(output[:, span].unbind(0))
            parts.append(WorkHandle(group.allgather([rows], [input[span]], options), output))
        return parts[0] if len(parts) == 1 else PartsHandle(parts, output)

    def all_to_all(self, output: Tensor, input: Tensor) -> Handle:
        """Start the all-to-all of rows; host memory only."""
        spans = self._spans(input[0], self._streams)
        if len(spans) == 1:
            return self._all_to_all(output, input, 0)
        # gloo takes and gives whole rows.
        received = [output[:, span].contiguous() for span in spans]
        parts = [
            self._all_to_all(into, input[:, span].contiguous(), i)
            for i, (span, into) in enumerate(zip(spans, received, strict=True))
        ]
        return PartsHandle(parts, output, lambda: torch.cat(received, 1, out=output))

    def _all_to_all(self, output: Tensor, input: Tensor, stream: int) -> WorkHandle:
        options = _c10d.AllToAllOptions()
        options.timeout = self._limit
        group = self._group(_stream("means", stream))
        return WorkHandle(group.alltoall_base(output, input, [], [], options), output)

    def _spans(self, x: Tensor, streams: int) -> list[slice]:
        """The parts of a message; what was asked for is done for small ones, too."""
        if streams == 1 or x.dim() != 1:
            return [slice(None)]
        exact = {"least": 0} if isinstance(self._asked, int) else {}
        return spans(len(x), x.nbytes, streams, **exact)

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """Replace `buffer` by that of the group's rank `source`.

        Host memory goes over gloo always.
        """
        group = self._group("control data" if self._nccl and not buffer.is_cuda else "means")
        host = buffer.cpu() if buffer.is_cuda and not self._nccl else buffer
        with self._one_error(f"a broadcast from rank {self.ranks[source]}"):
            options = _c10d.BroadcastOptions()
            options.rootRank = source
            start = time.perf_counter()
            group.broadcast([host], options).wait()
            # Of the largest message, whose time says most of the link's rate.
            self._largest = max(self._largest, (host.nbytes, time.perf_counter() - start))
        if host is not buffer:
            buffer.copy_(host)

    def all_gather_json(self, message: object, *, what: str = "") -> list[object]:
        """Everybody's message, in rank order, over the group for control data."""
        with self._one_error(what or "a message without a name"):
            group = self._group("control data")
            return control.all_gather_json(
                message, group, what=what, ranks=self.ranks, took=self._control_took
            )

    def _control_took(self, seconds: float) -> None:
        self._fastest_s = min(self._fastest_s, seconds)

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
        return _connect_again, (self._timeout.total_seconds(), self._asked, *self._prepared_for)

    @property
    def _nccl(self) -> bool:
        return self._backends.get("cuda") == "nccl"

    def _group(self, use: str) -> Any:
        if use not in self._groups:
            why = "nccl carries no codes" if self._groups else "this communicator has been closed"
            raise CommunicationError(f"no group for {use}: {why}")
        return self._groups[use]

    def _make(self, wanted: dict[str, str]) -> None:
        """Make groups of our own, those of gloo at the same time: each takes several round trips.

        Where we can, past `dist.new_group`: it names groups of some ranks after how many groups there
        are in this process, so that one that was left anywhere would make the next one's members look
        for each other under different names, or find addresses where nobody listens any more.

        Args:
            wanted: use -> backend.
        """
        self._groups_made += 1
        # torch has no public way to the store; `new_group` takes it from there too.
        store = _c10d._get_default_store()  # noqa: SLF001
        name = f"distoptim/{'_'.join(map(str, self.ranks))}/{self._number}/{self._groups_made}"
        rendezvous = Rendezvous(
            _c10d.PrefixStore(name, store), self.rank, self.ranks, self._timeout
        )
        makers = {
            use: partial(_made_of, _MAKERS[backend], self.rank, self.size, self._timeout)
            for use, backend in wanted.items()
            if backend in _MAKERS
        }
        self._groups.update(rendezvous.make(makers))
        for use, backend in wanted.items():
            if use not in makers:
                self._groups[use] = dist.new_group(
                    self._ranks,
                    timeout=self._timeout,
                    backend=backend,
                    use_local_synchronization=self._ranks is not None,
                )

    def _one_error(self, what: str) -> contextlib.AbstractContextManager[None]:
        limit = self._timeout.total_seconds()
        return control.one_error(
            f"rank {self.ranks[self.rank]}: {what} (timeout {limit:g} s)", self.close
        )

    def _all_reduce_in_parts(self, buffer: Tensor) -> TimedHandle:
        parts = [
            self._all_reduce(buffer[span], WorkHandle, _stream("means", i))
            for i, span in enumerate(self._spans(buffer, self._streams))
        ]
        return parts[0] if len(parts) == 1 else PartsHandle(parts, buffer)

    def _all_reduce(
        self,
        buffer: Tensor,
        handle: Callable[[dist.Work, Tensor, int], TimedHandle],
        use: str = "means",
    ) -> TimedHandle:
        average = self._averages.get(buffer.device.type, False)
        # torch.distributed.all_reduce knows no timeout of one collective.
        options = _c10d.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.AVG if average else dist.ReduceOp.SUM
        options.timeout = self._limit
        work = (self._groups.get(use) or self._group(use)).allreduce([buffer], options)
        return handle(work, buffer, 1 if average else self.size)


def _made_of(make: Callable[..., Any], rank: int, size: int, timeout: timedelta, store: Any) -> Any:
    return make(store, rank, size, timeout)


def _backends(group: dist.ProcessGroup | None) -> dict[str, str]:
    """Kind of device -> its backend. A group made without naming a backend has several."""
    pairs = [pair.split(":") for pair in str(dist.get_backend_config(group)).split(",")]
    return {pair[0]: pair[1] for pair in pairs}


def _stream(use: str, index: int) -> str:
    """The name of a group: the first stream is the group that is there without others."""
    return f"{use} {index + 1}" if index else use


def _connect_again(timeout_s: float, asked: int | str, nbytes: int, coded: bool) -> Communicator:
    """Over all workers of this program, as it was in another one."""
    communicator = connect(None, timeout_s, streams=asked)
    if nbytes:
        communicator.prepare(nbytes, coded=coded)
    return communicator


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
