"""A lighthouse, and a worker in a loop of its own that notes what it holds after every merge."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from distoptim import ALGORITHMS, Elastic
from distoptim.comm.elastic import ElasticHandle
from distoptim.simulator import Cluster

TAU = 4
HEARTBEAT_S = 1.5


def lighthouse(
    port: int, *, heartbeat_s: float = HEARTBEAT_S, join_s: float = 10.0, least: int = 1
) -> Any:
    from torchft.coordination import LighthouseServer

    return LighthouseServer(
        bind=f"127.0.0.1:{port}",
        min_replicas=least,
        join_timeout_ms=int(1000 * join_s),
        quorum_tick_ms=20,
        heartbeat_timeout_ms=int(1000 * heartbeat_s),
    )


def at(server: Any) -> str:
    """Its address."""
    return f"127.0.0.1:{server.address().rpartition(':')[2]}"


def write(path: Path, value: int) -> None:
    """For others to read, in whole."""
    path.with_suffix(".draft").write_text(str(value))
    path.with_suffix(".draft").replace(path)


@pytest.fixture
def address() -> Iterator[str]:
    server = lighthouse(0)
    yield at(server)
    server.shutdown()


def network(width: int = 8) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(6, width), torch.nn.Tanh(), torch.nn.Linear(width, 3)
    )


def batch_loss(model: torch.nn.Module, generator: torch.Generator, size: int = 8) -> torch.Tensor:
    x = torch.randn(size, 6, generator=generator)
    return (model(x) - x[:, :3]).square().mean()


@torch.no_grad()
def loss_of(model: torch.nn.Module) -> float:
    """On what no worker has trained on."""
    return float(batch_loss(model, torch.Generator().manual_seed(0), 4096))


def optimizer_of(params: Any, algorithm: str, options: dict[str, Any] | None, **fixed: Any) -> Any:
    """With AdamW inside where the options say so."""
    given = {"lr": 0.05, "tau": TAU, **fixed, **(options or {})}
    if given.pop("adamw", False):
        params = torch.optim.AdamW(params, lr=given.pop("lr"))
    return ALGORITHMS[algorithm](params, **given)


def undisturbed(algorithm: str, options: dict[str, Any], steps: int, seed: int) -> float:
    """The test loss of three virtual workers of whom none is ever lost."""
    generators = [torch.Generator().manual_seed(1000 * (seed + 1) + rank) for rank in range(3)]

    def made() -> torch.nn.Module:
        torch.manual_seed(seed)
        return network()

    cluster = Cluster(
        workers=3,
        model=made,
        optimizer=lambda params, communicator: optimizer_of(
            params, algorithm, options, communicator=communicator
        ),
        threads=1,
    )
    for _ in range(steps):
        cluster.step(lambda model, rank: batch_loss(model, generators[rank]))
    return loss_of(cluster.mean_model())


def stop_for(seconds: float) -> None:
    """This process, with all its threads."""
    if os.fork() == 0:
        time.sleep(seconds)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSTOP)


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """The histories of the means that come to be merged in the block, in order."""
    wait = ElasticHandle.wait
    histories: list[str] = []

    def waited(handle: ElasticHandle, timeout_s: float) -> Any:
        out = wait(handle, timeout_s)
        histories.append(handle.history)
        return out

    with mock.patch.object(ElasticHandle, "wait", waited):
        yield histories


def strike_at(
    owner: type, name: str, strike: Callable[[], None], *, after: bool, its_time: Callable[[], bool]
) -> None:
    """Strike before or after a method of this process, for good, at the calls of which it is time."""
    made = getattr(owner, name)

    @functools.wraps(made)
    def struck(*args: Any, **options: Any) -> Any:
        if not after and its_time():
            strike()
        out = made(*args, **options)
        if after and its_time():
            strike()
        return out

    setattr(owner, name, struck)


class Worker:
    """One in a loop of its own; notes what it holds after every merge."""

    def __init__(
        self,
        name: str,
        address: str,
        algorithm: str,
        *,
        tau: int = TAU,
        start: int = 3,
        min_workers: int = 1,
        timeout_s: float = 20.0,
        width: int = 8,
        options: dict[str, Any] | None = None,
    ) -> None:
        torch.manual_seed(ord(name))
        self.model = network(width)
        self.workers = Elastic(
            address,
            name=name,
            start=start,
            min_workers=min_workers,
            timeout_s=timeout_s,
            join_timeout_s=60.0,
        )
        self.optimizer = optimizer_of(
            self.model.parameters(),
            algorithm,
            options,
            tau=tau,
            communicator=self.workers,
            module=self.model,
        )
        self.began = self.optimizer.local_step
        self.generator = torch.Generator().manual_seed(ord(name))
        # By the history of the last mean that was merged: halves that go on apart for a while hold other things.
        self.held: dict[str, str] = {}
        self.steps = 0

    def step(self) -> None:
        loss = batch_loss(self.model, self.generator)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        before = self.merges()
        self.steps += 1
        with heard() as histories:
            self.optimizer.average(loss=loss)
        if self.merges() != before:
            # A first round's mean comes of itself, and so does one that was saved in flight.
            self.held[histories[-1] if histories else f"own {self.merges()}"] = self.holds()
        time.sleep(0.01)

    def merges(self) -> Any:
        """Of the one fragment, or of each."""
        counts = tuple(sync.merges for sync in self.optimizer.engine.syncs)
        return counts if len(counts) > 1 else counts[0]

    def holds(self) -> str:
        """What all must hold alike: the anchor, or x where it has just become the mean."""
        if self.optimizer.engine.shared_state()[0]:
            return str(self.optimizer.anchor_digest())
        if self.optimizer.engine.clock.delay == 0:
            return repr([p.detach().tolist() for p in self.model.parameters()])
        return ""

    def found(self) -> dict[str, Any]:
        stats = self.optimizer.stats()
        out = {
            "held": self.held,
            "began": self.began,
            "steps": self.steps,
            "members": self.workers.members,
            **{
                name: stats[name]
                for name in ("lost", "catch_ups", "syncs", "joins", "losses", "leaves")
            },
        }
        self.optimizer.close()
        return out


class Wire:
    """Carries TCP connections to an address, until it is cut or laid elsewhere; what is under way breaks then."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.is_cut = False
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self.is_cut = True
        self._break()

    def lay(self, address: str) -> None:
        self._address = address
        self._break()

    def _break(self) -> None:
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            if self.is_cut:
                near.close()
                continue
            host, _, port = self._address.rpartition(":")
            try:
                far = socket.create_connection((host, int(port)))
            except OSError:
                near.close()
                continue
            self._open += [near, far]
            for ends in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
