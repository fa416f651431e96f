"""The signals that tell a process to stop, and waiting in such a way that they are heard."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Future
from types import FrameType
from typing import TypeVar, final

# Between looks whether a signal has come.
_LOOK_S = 0.1
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
T = TypeVar("T")


class Stopped(Exception):
    """A signal ended what was going on."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@final
class StopSignals:
    """Notes SIGINT and SIGTERM instead of dying from them, within a `with` block of the main thread.

    Attributes:
        received: the signal that came last, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._raises = False

    def __enter__(self) -> StopSignals:
        """From here on signals are noted, and end nothing."""
        self._before = {s: signal.signal(s, self._note) for s in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Signals do again what they did before."""
        for s, handler in self._before.items():
            signal.signal(s, handler)

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Within the block a signal raises `Stopped`: there is nothing to save yet."""
        self._raises = True
        try:
            # After that: one that comes in between would be noted, and end nothing.
            if self.received:
                raise Stopped(self.received)
            yield
        finally:
            self._raises = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        if self._raises:
            raise Stopped(signum)


def interruptible(wait: Callable[[], T]) -> T:
    """What `wait` returns, so called that signals are handled meanwhile.

    Python runs handlers on the main thread between two of its own instructions: not while that
    thread is in torch, waiting for a peer that may never come.
    """
    future: Future[T] = Future()

    def answer() -> None:
        try:
            future.set_result(wait())
        except BaseException as error:  # noqa: BLE001  # raised where it is waited for
            future.set_exception(error)

    # A daemon: nobody can end the wait of one that has been left alone.
    threading.Thread(target=answer, daemon=True).start()
    # Again and again: Python does not run the handler of a signal that comes between its last instruction and
    # the beginning of a wait, until the wait is over.
    while not futures.wait([future], timeout=_LOOK_S).done:
        pass
    return future.result()
