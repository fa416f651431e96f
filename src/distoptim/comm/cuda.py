"""Means of CUDA buffers: NCCL on its own stream, or gloo by way of pinned host memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from distoptim.comm.handles import TimedHandle

_cuda: Any = torch.cuda  # whose events and streams have no types


@final
class NcclHandle(TimedHandle):
    """An NCCL all-reduce: waiting orders the current stream behind it.

    A side stream follows the collective and brings the last elements to the host, so that reading
    it waits for the collective alone, never for the computation queued meanwhile. How long the
    current stream stood still is read from two events once the GPU has passed them.

    Args:
        work: the collective.
        buffer: where the mean will be.
        divisor: what the result is still to be divided by.
    """

    def __init__(self, work: dist.Work, buffer: Tensor, divisor: int = 1) -> None:
        super().__init__(buffer, now=time.perf_counter())
        self._work: dist.Work | None = work
        self._events: tuple[Any, Any] | None = None
        # Weight, identity and what a period measures.
        self._tail = torch.empty(min(32, len(buffer)), dtype=buffer.dtype, pin_memory=True)
        side = _side_stream(buffer.device)
        with torch.cuda.stream(side):
            work.wait()
            if divisor != 1:
                buffer.div_(divisor)
            self._tail.copy_(buffer[-len(self._tail) :], non_blocking=True)
        self._there = side.record_event()

    def wait(self, timeout_s: float) -> None:
        """Block the host until the collective has ended, at most `timeout_s`."""
        stream = torch.cuda.current_stream(self.buffer.device)
        before, after = (_cuda.Event(enable_timing=True) for _ in range(2))
        before.record(stream)
        stream.wait_event(self._there)
        after.record(stream)
        self._wait(timeout_s)
        self._events = before, after

    def _wait(self, timeout_s: float) -> None:
        limit = time.perf_counter() + timeout_s
        while not self._there.query():
            if time.perf_counter() > limit:
                raise RuntimeError(f"NCCL collective timed out after {timeout_s:g} s")
            time.sleep(1e-4)
        self.look(over=True)
        # The work is forgotten, as in `WorkHandle`.
        self._work = None

    def poll(self) -> None:
        """Note the end, and read the events when they have passed."""
        if self._work is not None:
            self.look(self._work.is_completed())
        if self.waited_s is None and self._events is not None and self._events[1].query():
            self.waited_s = self._events[0].elapsed_time(self._events[1]) / 1e3

    def tails(self, count: int) -> Tensor:
        """From pinned memory, to which the mean's end was copied behind it."""
        return self._tail[-count:]


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = _cuda.Stream(device)
    return _streams[device]


class Staging:
    """CUDA buffers over gloo: device -> pinned host -> all-reduce -> device, on a side stream.

    A collective starts at the first `poll` (one comes with every local step) after its copy to the
    host has ended, so the training thread never waits for the GPU. All ranks still start theirs in
    one order: first launched, first started.
    """

    def __init__(self, all_reduce: Callable[[Tensor], TimedHandle]) -> None:
        self.all_reduce = all_reduce
        self.queue: deque[StagedHandle] = deque()

    def launch(self, buffer: Tensor) -> StagedHandle:
        """Copy `buffer` to the host behind what the current stream has queued so far."""
        handle = StagedHandle(buffer, self)
        self.queue.append(handle)
        return handle


@final
class StagedHandle(TimedHandle):
    """One buffer under way through `Staging`."""

    def __init__(self, buffer: Tensor, staging: Staging) -> None:
        super().__init__(buffer, now=time.perf_counter())
        stream = _side_stream(buffer.device)
        self._stream = stream
        self._staging = staging
        self._collective: TimedHandle | None = None
        self._host = torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=True)
        # Behind the kernels that still write the payload.
        stream.wait_stream(torch.cuda.current_stream(buffer.device))
        with torch.cuda.stream(stream):
            self._host.copy_(buffer, non_blocking=True)
        self._copied = stream.record_event()

    def poll(self) -> None:
        """Start every collective whose copy has ended, oldest first."""
        queue = self._staging.queue
        while queue and queue[0]._copied.query():
            queue.popleft()._start()
        if self._collective is not None:
            self._collective.poll()
            self._note_end(self._collective)

    def _note_end(self, collective: TimedHandle) -> None:
        self.finished_at = collective.finished_at
        self.unfinished_at = collective.unfinished_at

    def _start(self) -> None:
        self._collective = self._staging.all_reduce(self._host)

    def _wait(self, timeout_s: float) -> None:
        while self._collective is None:
            oldest = self._staging.queue.popleft()
            oldest._copied.synchronize()
            oldest._start()
        self._collective.wait(timeout_s)
        self._note_end(self._collective)
        with torch.cuda.stream(self._stream):
            self.buffer.copy_(self._host, non_blocking=True)
        # The merge comes next on the current stream, and reads the mean.
        torch.cuda.current_stream(self.buffer.device).wait_stream(self._stream)

    def tails(self, count: int) -> Tensor:
        """From the copy in host memory, in which gloo has averaged."""
        return self._host[-count:]
