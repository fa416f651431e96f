"""A training script under torchrun: what DistributedDataParallel did, averaging in the background does.

torchrun --nproc-per-node=2 examples/ddp_replaced.py

The lines that differ: with DDP those marked with "+" were not there, and those behind "# -" were.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

import distoptim  # +

STEPS = 200
BATCH = 32


def main() -> None:
    """Train a regression; rank 0 prints the loss of the workers' mean."""
    dist.init_process_group("gloo")  # "nccl" on GPUs
    rank = dist.get_rank()
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))
    # - model = nn.parallel.DistributedDataParallel(model)
    # - optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sgd = {"lr": 0.05, "momentum": 0.9}  # +
    optimizer = distoptim.OverlapLocalSGD(model.parameters(), **sgd, tau=8, module=model)  # +
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    def loss_on(data: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(model(data), data[:, :1].sin())

    # This worker's share of the data.
    stream = torch.Generator().manual_seed(1000 + rank)
    for _ in range(STEPS):
        loss_on(torch.randn(BATCH, 16, generator=stream)).backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.average()  # +
        schedule.step()

    # - with torch.no_grad():
    with optimizer.averaged(model), torch.no_grad():  # + workers differ between averages
        unseen = torch.randn(512, 16, generator=torch.Generator().manual_seed(-1))
        loss = loss_on(unseen).item()
        if rank == 0:
            torch.save(model.state_dict(), "model.pt")
            print(f"loss of the mean: {loss:.3f}")
    waited = optimizer.stats()["exposed_share"]  # +
    print(f"rank {rank} waited for {waited:.1%} of its computation")  # +
    optimizer.close()  # +
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
