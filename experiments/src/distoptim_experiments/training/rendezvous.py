"""Where the processes of a run find each other."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # public, but not marked so

from distoptim_experiments.training.signals import interruptible

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Rendezvous:
    """A store's host and port, this process's rank, and how many there are.

    Args:
        host, port: of a TCPStore.
        rank: in [0, size).
        size: number of ranks.
        prefix: of the keys in the store, so that a second attempt does not find the first one's
            addresses.
        hosted: whether somebody else (a parent, torchrun's agent) serves the store; otherwise rank
            0 does.
    """

    host: str
    port: int
    rank: int
    size: int
    prefix: str = ""
    hosted: bool = True

    def connect(self, timeout_s: float) -> Store:
        """The store; it may be used for one run after another, with a prefix for each."""
        store: Store = interruptible(
            lambda: TCPStore(
                self.host,
                self.port,
                self.size,
                timeout=timedelta(seconds=timeout_s),
                is_master=not self.hosted and self.rank == 0,
                wait_for_workers=False,
            )
        )
        return PrefixStore(self.prefix, store) if self.prefix else store


def loopback_interface() -> str:
    """The name of the interface on which no other machine hears us; gloo would take the host name's."""
    names = [name for _, name in socket.if_nameindex()]
    return "lo" if "lo" in names else "lo0"


def serve_on_loopback() -> TCPStore:
    """A store for processes of this machine alone; torch's own listens on every interface."""
    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    # The store owns the socket from here on.
    return TCPStore(
        LOOPBACK,
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
        # The other kind takes no socket in torch 2.6.
        use_libuv=False,
    )


def at_url(url: str, rank: int | None, size: int | None) -> Rendezvous:
    """At tcp://HOST:PORT, where rank 0 serves; an IPv6 address stands in brackets.

    Raises:
        ValueError: the URL is another one, or the rank is not in [0, size).
    """
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme != "tcp" or not parts.hostname or not port or parts.path:
        raise ValueError(f"--init {url}: expected tcp://HOST:PORT")
    if rank is None or size is None or not 0 <= rank < size:
        raise ValueError(
            f"--init needs --rank and --world-size with 0 <= rank < world size, got {rank} and {size}"
        )
    return Rendezvous(parts.hostname, port, rank, size, hosted=False)


def from_torchrun() -> Rendezvous | None:
    """What torchrun (or whoever sets the same variables) says; None if nobody does.

    Raises:
        ValueError: only some of the variables are set, or they are not numbers.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    try:
        host = os.environ["MASTER_ADDR"]
        port = int(os.environ["MASTER_PORT"])
        rank = int(os.environ["RANK"])
        size = int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"RANK and WORLD_SIZE are set, MASTER_ADDR and MASTER_PORT are not: {error}"
        ) from error
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    # A store of the workers' own is new at every attempt; and the agents of several hosts count
    # attempts differently.
    attempt = f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}" if hosted else ""
    return Rendezvous(host, port, rank, size, attempt, hosted)
