"""Ranks in pairs train as workers: FSDP2 or DDP inside a pair, Overlap-Local-SGD over AdamW across
pairs.

torchrun --nproc-per-node=4 examples/islands.py [fsdp2|ddp]
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distoptim

SIZE = 2  # ranks in an island
BATCH = 32  # samples of a worker in a step
TAU = 4  # local steps in a round


def train(kind: str, steps: int) -> tuple[float, float]:
    """Returns the loss of the workers' mean, on data that none has seen, before and after.

    Collective.
    """
    mesh = init_device_mesh(
        "cpu", (dist.get_world_size() // SIZE, SIZE), mesh_dim_names=("replicate", "shard")
    )
    worker = mesh.get_local_rank("replicate")
    place = mesh.get_local_rank("shard")
    # The same model on all ranks of an island; between islands rank 0's is broadcast.
    torch.manual_seed(worker)
    model: nn.Module = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))
    if kind == "fsdp2":
        fully_shard(model[0], mesh=mesh["shard"])
        model = fully_shard(model, mesh=mesh["shard"])
    elif kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group("shard"))
    else:
        raise ValueError(f"{kind!r}: allowed is fsdp2 or ddp")
    optimizer = distoptim.OverlapLocalSGD(
        torch.optim.AdamW(model.parameters(), lr=0.01), tau=TAU, device_mesh=mesh, module=model
    )

    def loss_on(data: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(model(data), data.sum(1, keepdim=True).sin())

    def score() -> float:
        # All ranks of an island are needed for a forward pass of FSDP2.
        with optimizer.averaged(model), torch.no_grad():
            return loss_on(torch.randn(512, 16, generator=torch.Generator().manual_seed(-1))).item()

    before = score()
    stream = torch.Generator().manual_seed(1000 + worker)
    for _ in range(steps):
        # The worker's batch, the same on all its ranks; each takes its share.
        data = torch.randn(BATCH, 16, generator=stream).chunk(SIZE)[place]
        loss_on(data).backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.average()
    after = score()
    optimizer.close()
    return before, after


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = train(sys.argv[1] if len(sys.argv) > 1 else "fsdp2", steps=200)
    if dist.get_rank() == 0:
        print("loss of the mean: {:.3f} before, {:.3f} after".format(*found))
    dist.destroy_process_group()
