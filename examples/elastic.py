"""A worker that may die and come back, and that goes on without others that do.

In one terminal the lighthouse, in three others a worker each, called a, b and c:

distoptim lighthouse --bind 127.0.0.1:29510
python examples/elastic.py 127.0.0.1:29510 NAME

Kill one with `kill -9` and give its line again.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

import distoptim

BATCH = 32


def main(lighthouse: str, name: str, start: int, steps: int) -> None:
    """Train until so many local steps have been made; print who takes part when that changes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))
    workers = distoptim.Elastic(lighthouse, name=name, start=start)
    # Blocks until `start` workers are there, or, where a run is on, until it is part of it.
    optimizer = distoptim.OverlapLocalSGD(
        model.parameters(), lr=0.05, momentum=0.9, tau=20, communicator=workers, module=model
    )
    stream = torch.Generator().manual_seed(sum(name.encode()))
    generation = 0
    while optimizer.local_step < steps:
        data = torch.randn(BATCH, 16, generator=stream)
        nn.functional.mse_loss(model(data), data[:, :1].sin()).backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.average()
        if workers.generation != generation:
            generation = workers.generation
            print(f"local step {optimizer.local_step}: {workers.members}", flush=True)
    with optimizer.averaged(model):
        print(
            f"{name}: anchor {optimizer.anchor_digest()[:12]}, {optimizer.stats()['syncs']:.0f} means"
        )
    optimizer.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:5] or (3, 20_000)))
