"""This process's end of an emulated link.

Works that end when the link could have done them, one after the other.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

EXIT_WAIT_S = 60.0

# torch's stubs do not know the constructor that a Python work overrides.
_c10d: Any = dist


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
        limit = timeout if timeout else self._timeout
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
_lock, _free_at = threading.Lock(), 0.0


def serve(group: object) -> queue.SimpleQueue[_Item]:
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


def book(start: float, seconds: float) -> float:
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
        except Exception as failure:
            error = str(failure)
        work.end(tensors, error)
        # Peers hear of a failure only when nobody holds the group any more.
        del item, work, run, tensors
