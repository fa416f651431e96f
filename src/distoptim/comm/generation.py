"""The workers of one generation: a gloo group among them, and messages in it that notice who is gone."""

from __future__ import annotations

import hashlib
import io
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from distoptim.comm import control
from distoptim.comm.communicator import Communicator, SingleWorker
from distoptim.comm.handles import Handle, WorkHandle
from distoptim.comm.lighthouse import PAUSE_S, Asked

# torch types neither the stores nor a backend's options.
_dist: Any = dist
# While a group is built nobody hears of a death but by asking: so often, and connecting takes at most so long.
_LOOK_S = 0.02
_CONNECT_S = 5.0


@final
class Store:
    """A worker's own, at one address alone, where others meet it.

    Args:
        host: an address of this machine.
        timeout_s: bound of a wait for one that stands still, in seconds.

    Raises:
        ValueError: it is none.
    """

    def __init__(self, host: str, timeout_s: float) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listening = socket.create_server((host, 0), family=family)
        except OSError as error:
            raise ValueError(
                f"host={host!r}: {error.strerror}; allowed is an address of this machine"
            ) from error
        port = listening.getsockname()[1]
        self.host = host
        self.timeout_s = timeout_s
        self.address = f"{host} {port}"
        self._store = _dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listening.detach(),
            # That kind takes no socket in torch 2.6.
            use_libuv=torch.__version__ >= "2.8",
        )

    def tell(self, name: str, text: str) -> None:
        """For others to read."""
        self._store.set(name, text)

    def of(self, worker: Asked) -> Any:
        """Another worker's, or this one's own.

        Raises:
            OSError: it is gone.
        """
        if worker.store == self.address:
            return self._store
        # The client would try again until its timeout.
        host, port = see_alive(worker)
        limit = timedelta(seconds=self.timeout_s)
        return _dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)


def see_alive(worker: Asked) -> tuple[str, int]:
    """Whether the process is there: one that stands still is; where its store is.

    Raises:
        OSError: it is not.
    """
    host, _, port = worker.store.rpartition(" ")
    socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    return host, int(port)


@final
class Generation:
    """The members of a mean, in the order of their names, and their group.

    Args:
        members: all of them.
        life: of this one.
        store: of this one.
        meet: at whose store.

    Attributes:
        key: its name, unlike that of any other.
        rank: of this worker.
        workers: who means are made among.

    Raises:
        RuntimeError, OSError: one is gone, or stands still.
    """

    def __init__(self, members: Sequence[Asked], life: str, store: Store, meet: Asked) -> None:
        self.members = list(members)
        self.lives = tuple(w.life for w in members)
        # Of how often they have asked, so that no group of before has the name.
        self.key = digest(*(f"{w.life}{w.asked}" for w in members))
        self.rank = self.lives.index(life)
        self.workers: Communicator = SingleWorker()
        self._timeout_s = store.timeout_s
        self._work: Any = None
        if len(members) > 1:
            shared = _dist.PrefixStore(self.key, store.of(meet))
            self._gather_at(shared)
            self._work = _gloo(shared, self.rank, len(members), store.host, self._timeout_s)
            self.workers = Among(self._work, self.rank, len(members), self._timeout_s)

    def is_of(self, members: Sequence[Asked]) -> bool:
        """Whether these are the members, and all have this group still."""
        held = {w.said.holds for w in members}
        return tuple(w.life for w in members) == self.lives and held == {self.key}

    def _gather_at(self, store: Any) -> None:
        """Wait until all have come to build their group, as long as those that have not are alive.

        A group that is built with one that died after the lighthouse named it would be waited for as long
        as one that stands still.
        """
        own = self.members[self.rank]
        store.set(own.life, "")
        missing = [w for w in self.members if w is not own]
        deadline = time.monotonic() + self._timeout_s
        while missing := [w for w in missing if not store.check([w.life])]:
            for worker in missing:
                see_alive(worker)
            if time.monotonic() > deadline:
                raise RuntimeError(f"{missing[0].name} has not come within {self._timeout_s:g} s")
            time.sleep(_LOOK_S)

    def give(self, state: Any, receivers: Sequence[Asked]) -> None:
        """Send tensors and plain data to each of these."""
        file = io.BytesIO()
        torch.save(state, file)
        message = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
        for worker in receivers:
            rank = self.lives.index(worker.life)
            self._wait(self._work.send([torch.tensor([message.numel()])], rank, 0), worker)
            self._wait(self._work.send([message], rank, 1), worker)

    def receive(self, giver: Asked) -> Any:
        """What that one gives."""
        source = self.lives.index(giver.life)
        size = torch.zeros(1, dtype=torch.int64)
        self._wait(self._work.recv([size], source, 0), giver)
        message = torch.zeros(int(size), dtype=torch.uint8)
        self._wait(self._work.recv([message], source, 1), giver)
        return torch.load(io.BytesIO(message.numpy().tobytes()), weights_only=True)

    def _wait(self, work: Any, other: Asked) -> None:
        """Wait for a message to or from one worker; gloo would not hear of its death.

        Raises:
            RuntimeError: it is gone, or stands still for longer than the timeout.
        """
        over = threading.Event()

        def watch() -> None:
            try:
                while not over.wait(PAUSE_S):
                    see_alive(other)
            except OSError:
                work.abort()

        thread = threading.Thread(target=watch, name="distoptim watch", daemon=True)
        thread.start()
        try:
            if not work.wait(timedelta(seconds=self._timeout_s)):
                raise RuntimeError(f"{other.name} is gone")
        finally:
            over.set()
            thread.join()

    def leave(self) -> None:
        """Abort what is on its way; the others hear of it when nobody here holds the group any more."""
        work = self._work
        self._work = None
        self.workers = SingleWorker()
        if work is not None:
            work.abort()


@final
class Among(Communicator):
    """The collectives of one group, from the communication thread."""

    def __init__(self, work: Any, rank: int, size: int, timeout_s: float) -> None:
        self.rank = rank
        self.size = size
        self._work = work
        self._timeout_s = timeout_s

    def all_reduce(self, buffer: Tensor) -> Handle:
        """The mean; gloo has the sum."""
        return WorkHandle(self._work.allreduce([buffer]), buffer, self.size)

    def all_gather(self, output: Tensor, input: Tensor, *, after: Handle | None = None) -> Handle:
        """On the one connection there is: one mean is made after the other."""
        return WorkHandle(self._work.allgather([list(output.unbind(0))], [input]), output)

    def all_to_all(self, output: Tensor, input: Tensor) -> Handle:
        """Rows."""
        return WorkHandle(self._work.alltoall_base(output, input, [], []), output)

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """Blocks."""
        self._work.broadcast(buffer, source).wait(timedelta(seconds=self._timeout_s))

    def all_gather_json(self, message: object, *, what: str = "") -> list[object]:
        """Blocks."""
        return control.all_gather_json(message, self._work, what=what)


def digest(*parts: str) -> str:
    """A text that only these have."""
    return hashlib.sha1("|".join(parts).encode(), usedforsecurity=False).hexdigest()


def _gloo(store: Any, rank: int, size: int, host: str, timeout_s: float) -> Any:
    # torch has no public options of a backend.
    options = _dist.ProcessGroupGloo._Options()  # noqa: SLF001
    options._devices = [_dist.ProcessGroupGloo.create_device(hostname=host)]  # noqa: SLF001
    # All are here: connecting waits for nobody but one that dies in these milliseconds.
    options._timeout = timedelta(seconds=min(_CONNECT_S, timeout_s))  # noqa: SLF001
    group = _dist.ProcessGroupGloo(store, rank, size, options)
    group._set_default_timeout(timedelta(seconds=timeout_s))  # noqa: SLF001
    return group
