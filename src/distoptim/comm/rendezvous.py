"""How groups that are made at the same time find their peers: in few messages to the program's store."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from datetime import timedelta
from functools import partial
from typing import Any, final

import torch.distributed as dist

# Of whose types torch's stubs do not know.
_TorchStore: Any = dist.Store  # type: ignore[attr-defined]  # public, not marked so


@final
class Rendezvous:
    """The program's store, which is asked for all groups and all peers at once.

    gloo asks for one peer after the other, three round trips each, and so does every group. Here nobody
    asks before all groups have come so far, and one question is for all of them: two round trips for any
    number of groups and workers.

    Args:
        store: in which the keys are this rendezvous' own.
        rank: of this worker, in [0, workers).
        ranks: what errors call the workers.
        timeout: bound of the wait for the others.
    """

    def __init__(self, store: Any, rank: int, ranks: Sequence[int], timeout: timedelta) -> None:
        self._store = store
        self._rank = rank
        self._ranks = ranks
        self._timeout = timeout
        self._changed = threading.Condition()
        # Groups that are being made, and how many of them wait for others' keys.
        self._open = 0
        self._waiting = 0
        self._set: set[str] = set()
        # Key -> the worker who sets it.
        self._wanted: dict[str, int] = {}
        self._found: dict[str, bytes] = {}
        self._failure: str | None = None

    def make(self, makers: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
        """Groups by name, made at the same time.

        Args:
            makers: by name, what makes a group that finds its peers in the store it is given.

        Raises:
            RuntimeError: not all workers came in time, or a group could not be made. After two timeouts at
                most: one for the others to come, one for gloo to connect, which where a peer dies meanwhile
                would take up to five.
        """
        if not makers:
            return {}
        self._open = len(makers)
        made = {name: _begun(partial(self._one, name, make)) for name, make in makers.items()}
        limit_s = 2 * self._timeout.total_seconds()
        over, late = futures.wait(made.values(), limit_s, futures.FIRST_EXCEPTION)
        for future in over:
            future.result()
        if late:
            raise RuntimeError(f"connections are not there after {limit_s:g} s")
        return {name: future.result() for name, future in made.items()}

    def _one(self, name: str, make: Callable[[Any], Any]) -> Any:
        try:
            return make(_Entry(self, name))
        finally:
            self._leave()

    def set(self, key: str, value: bytes) -> None:
        """Tell the others; does not wait."""
        with self._changed:
            self._set.add(key)
            self._store.set(key, value)

    def get(self, key: str) -> bytes:
        """What a worker has set, once it has.

        Raises:
            RuntimeError: it did not in time.
        """
        with self._changed:
            if key not in self._found:
                self._wanted.update(self._alike(key))
                self._waiting += 1
                self._look()
                self._changed.wait_for(lambda: key in self._found or self._failure)
            if self._failure:
                raise RuntimeError(self._failure)
            return self._found[key]

    def _leave(self) -> None:
        """A group is made, or cannot be."""
        with self._changed:
            self._open -= 1
            self._look()

    def _look(self) -> None:
        """Whether all have got as far as they can alone."""
        if self._waiting and self._waiting == self._open:
            self._ask()
            self._waiting = 0
            self._changed.notify_all()

    def _alike(self, key: str) -> dict[str, int]:
        """The key, and those of the other workers if this one has set its own."""
        found = re.fullmatch(r"(.*?)(\d+)", key)
        if found is None or f"{found[1]}{self._rank}" not in self._set:
            return {key: self._rank}
        return {f"{found[1]}{i}": i for i in range(len(self._ranks))}

    def _ask(self) -> None:
        """For all that is wanted; the others wait meanwhile."""
        wanted = self._wanted
        self._wanted = {}
        try:
            with self._bounded():
                values = self._store.multi_get(list(wanted))
            self._found.update(zip(wanted, map(bytes, values), strict=True))
        except RuntimeError as error:
            absent = {self._ranks[i] for key, i in wanted.items() if not self._store.check([key])}
            self._failure = f"ranks {sorted(absent)} have not come: {error}"

    @contextlib.contextmanager
    def _bounded(self) -> Iterator[None]:
        """The store, which is the program's, with our timeout."""
        usual = self._store.timeout
        self._store.set_timeout(self._timeout)
        try:
            yield
        finally:
            self._store.set_timeout(usual)


@final
class _Entry(_TorchStore):  # type: ignore[misc]  # a class without types
    """A rendezvous as the store of one group."""

    def __init__(self, rendezvous: Rendezvous, group: str) -> None:
        super().__init__()
        self._rendezvous = rendezvous
        self._group = group

    def set(self, key: str, value: bytes) -> None:
        """Called by gloo, as the others are."""
        self._rendezvous.set(f"{self._group}/{key}", value)

    def get(self, key: str) -> bytes:
        """Blocks."""
        return self._rendezvous.get(f"{self._group}/{key}")

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Blocks."""
        for key in keys:
            self.get(key)


def _begun(call: Callable[[], Any]) -> futures.Future[Any]:
    """A call in a daemon thread, whose end the program need not wait for."""
    future: futures.Future[Any] = futures.Future()

    def answer() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001  # raised where it is waited for
            future.set_exception(error)

    threading.Thread(target=answer, daemon=True).start()
    return future
