"""torchft's DiLoCo as a peer: each worker a replica group of one, with a manager; a lighthouse beside rank 0."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

LIGHTHOUSE_PORT = 29710
TIMEOUT = timedelta(seconds=60)

VARIANTS: dict[str, dict[str, Any]] = {
    "torchft DiLoCo": {},
    "torchft DiLoCo, bucketized": {"use_bucketization": True},
    "torchft streaming DiLoCo, 2 fragments": {"fragments": 2, "fragment_sync_delay": 3},
}
"""Options of torchft's class, and in how many fragments."""


def address(rank: int) -> str:
    """Of a host of `benchmarks.delay_line`."""
    return f"10.77.0.{rank + 1}"


@contextlib.contextmanager
def lighthouse() -> Iterator[str]:
    """Its address, for all; it runs beside rank 0."""
    # They would print every message.
    os.environ.setdefault("RUST_LOG", "warn")
    from torchft.coordination import LighthouseServer

    server = None
    if dist.get_rank() == 0:
        server = LighthouseServer(
            bind=f"[::]:{LIGHTHOUSE_PORT}", min_replicas=dist.get_world_size(), quorum_tick_ms=20
        )
    dist.barrier()
    yield f"http://{address(0)}:{LIGHTHOUSE_PORT}"
    dist.barrier()
    if server is not None:
        server.shutdown()


@contextlib.contextmanager
def manager(at: str) -> Iterator[Any]:
    """Of this worker.

    Args:
        at: address of the lighthouse.
    """
    from torchft import Manager, ProcessGroupGloo

    rank = dist.get_rank()
    # Of another host of the delay line, which nobody else reaches; without one, of this machine.
    store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]  # public, not marked so
    made = Manager(
        ProcessGroupGloo(timeout=TIMEOUT),
        None,
        None,
        min_replica_size=dist.get_world_size(),
        use_async_quorum=False,
        timeout=TIMEOUT,
        rank=0,
        world_size=1,
        store_addr=address(rank),
        store_port=store.port,
        lighthouse_addr=at,
        replica_id=f"peer_{rank}",
        hostname=address(rank),
        # All begin with the same parameters.
        init_sync=False,
    )
    yield made
    dist.barrier()
    made.shutdown(wait=False)


def wrapped(
    by: Any, model: nn.Module, inner: torch.optim.Optimizer, tau: int, options: dict[str, Any]
) -> Any:
    """The class around a model; its hooks sit on the inner optimizer.

    Args:
        by: the manager.
        model: what is trained.
        inner: makes the local steps.
        tau: of them in a round.
        options: of the class.
    """
    from torchft.local_sgd import DiLoCo

    options = dict(options)
    count = options.pop("fragments", 1)
    params = list(model.parameters())
    # A fragment is a module.
    parts = [
        nn.ParameterList(params[i * len(params) // count : (i + 1) * len(params) // count])
        for i in range(count)
    ]
    outer = [
        torch.optim.SGD(part.parameters(), lr=0.7, momentum=0.9, nesterov=True) for part in parts
    ]
    return DiLoCo(by, parts, inner, outer, tau, pin_memory=False, **options)


def methods(
    make: Callable[[], nn.Module],
    adamw: Callable[[nn.Module], torch.optim.Optimizer],
    stepper: Callable[[nn.Module, Any], Callable[[], None]],
    tau: int,
) -> Iterator[tuple[str, Callable[[], None]]]:
    """By name, how each variant trains; made one after the other.

    Args:
        make: the model.
        adamw: the inner optimizer.
        stepper: a training loop's body.
        tau: local steps in a round.
    """
    with lighthouse() as at:
        for name, options in VARIANTS.items():
            model = make()
            inner = adamw(model)
            with manager(at) as by, wrapped(by, model, inner, tau, options):
                yield name, stepper(model, inner)
