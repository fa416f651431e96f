"""The optimizer that you have, AdamW here, averaged at every step in 4 bits, and nothing waited for.

torchrun --nproc-per-node=2 examples/every_step.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

import distoptim

STEPS = 200
BATCH = 32


def main() -> None:
    """Train a regression; rank 0 prints what was done to AdamW, and the loss of the workers' mean."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = distoptim.GlobalMomentum(
        torch.optim.AdamW(model.parameters(), lr=0.02), module=model
    )

    def loss_on(data: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(model(data), data[:, :1].sin())

    # This worker's share of the data.
    stream = torch.Generator().manual_seed(1000 + rank)
    for _ in range(STEPS):
        loss_on(torch.randn(BATCH, 16, generator=stream)).backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.average()
    with optimizer.averaged(model), torch.no_grad():
        loss = loss_on(torch.randn(512, 16, generator=torch.Generator().manual_seed(-1))).item()
    optimizer.close()
    if rank == 0:
        print(optimizer.moved)
        print(f"loss of the mean: {loss:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
