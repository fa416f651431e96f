"""The ranks of a run: who is where, and how they speak beside the training's own communication."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]  # public, but not marked so

from distoptim import checks
from distoptim.comm import emulate
from distoptim.comm.control import all_gather_json
from distoptim_experiments.config import RunConfig
from distoptim_experiments.training.rendezvous import Rendezvous


@dataclass(frozen=True)
class Seat:
    """A rank among all: `island_size` neighbours are one worker.

    Args:
        rank: among all.
        workers: how many there are.
        island_size: ranks of each.
        virtual: they are virtual, all in one process, which has rank 0.
    """

    rank: int = 0
    workers: int = 1
    island_size: int = 1
    virtual: bool = False

    @property
    def worker(self) -> int:
        """Which worker this rank is, or is part of."""
        return self.rank // self.island_size

    @property
    def part(self) -> int:
        """Index of this rank among those of its worker."""
        return self.rank % self.island_size


def workers_of(ranks: int, island_size: int) -> int:
    """How many workers so many ranks are.

    Raises:
        ValueError: the size of an island does not divide their number.
    """
    if ranks % checks.integer("island_size", island_size, 1):
        raise ValueError(
            f"island_size={island_size} with {ranks} ranks: allowed is a number that divides it"
        )
    return ranks // island_size


class World:
    """This rank's seat, and a private gloo group for small messages that the emulated link does
    not slow down; collective.

    Args:
        island_size: ranks of each worker.

    Attributes:
        seat: this rank's.
        control: the private group.
    """

    def __init__(self, island_size: int = 1) -> None:
        workers = workers_of(dist.get_world_size(), island_size)
        self.seat = Seat(dist.get_rank(), workers, island_size)
        self.control = dist.new_group(backend="gloo")

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        dist.barrier(self.control)

    def gather(self, message: object) -> list[Any]:
        """Everybody's message, in rank order, as JSON: what a peer sends is never unpickled."""
        return all_gather_json(message, self.control)


def join(rendezvous: Rendezvous, config: RunConfig, store: Store | None = None) -> World:
    """Start torch.distributed, over the emulated link if the run has one, and wait for all ranks.

    Args:
        rendezvous: where they find each other.
        config: the run.
        store: of the rendezvous, if there is a connection already; nothing of an earlier run may be
            in it.
    """
    link = config.link
    backend = (
        "gloo"
        if link is None
        else emulate(latency_s=link.latency_s, bandwidth_gbit_s=link.bandwidth_gbit_s)
    )
    dist.init_process_group(
        backend,
        store=rendezvous.connect(config.timeout_s) if store is None else store,
        rank=rendezvous.rank,
        world_size=rendezvous.size,
        timeout=timedelta(seconds=config.timeout_s),
    )
    return World(config.island_size)
