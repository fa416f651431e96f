"""Workers of several ranks each.

They share a worker's batches and are one model together, by DDP or FSDP2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import timedelta
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from distoptim_experiments.config import FSDP2, RunConfig
from distoptim_experiments.training.methods.averaging import Averaging
from distoptim_experiments.training.methods.base import Costs, Method
from distoptim_experiments.training.methods.ddp import NO_BUFFER_SYNC


@final
class IslandAveraging(Method):
    """An algorithm of `distoptim` between workers of `island_size` ranks, which average gradients
    at every step.

    Neighbouring ranks are a worker. Each trains on its part of the worker's batch, and averages
    what it holds, the whole model (DDP) or a shard (FSDP2), with the ranks that hold the same part
    of the other workers. The emulated link lies between workers only. Batch norm sees a rank's
    part, and its statistics stay with the rank.

    Args:
        model: what is trained in place.
        config: the run.

    Attributes:
        inside: the group of this worker's ranks.
        between: that of the ranks with the same part, one of each worker.
    """

    def __init__(self, model: nn.Module, config: RunConfig) -> None:
        self._size = config.island_size
        self._part = dist.get_rank() % self._size
        ranks = torch.arange(config.ranks).view(config.workers, self._size)
        timeout = timedelta(seconds=config.timeout_s)
        self.inside = _group(ranks.tolist(), timeout, backend="gloo")
        module = (
            _sharded(model, self.inside)
            if config.island_kind == FSDP2
            else DistributedDataParallel(model, process_group=self.inside, **NO_BUFFER_SYNC)
        )
        self.between = _group(ranks.T.tolist(), timeout)
        self._averaging = Averaging(model, config, module=module, group=self.between)
        self.optimizer = self._averaging.optimizer

    def step(self, images: Tensor, labels: Tensor) -> float:
        """One step on this rank's part of the worker's batch; the loss is the worker's."""
        loss = self._averaging.step(
            images.chunk(self._size)[self._part], labels.chunk(self._size)[self._part]
        )
        total = torch.tensor(loss, dtype=torch.float64)
        dist.all_reduce(total, group=self.inside)
        return total.item() / self._size

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Mean parameters and batch-norm statistics of the ranks with the same part."""
        return self._averaging.averaged()

    def costs(self) -> Costs:
        """This rank's."""
        return self._averaging.costs()

    def stats(self) -> dict[str, float]:
        """This rank's."""
        return self._averaging.stats()

    def close(self) -> None:
        """Close the optimizer."""
        self._averaging.close()


def _group(
    ranks: Sequence[Sequence[int]], timeout: timedelta, backend: str | None = None
) -> dist.ProcessGroup:
    """This rank's of some groups that are all ranks together; collective."""
    group, _ = dist.new_subgroups_by_enumeration(  # type: ignore[no-untyped-call]  # torch has no types
        ranks, timeout=timeout, backend=backend
    )
    assert isinstance(group, dist.ProcessGroup)
    return group


def _sharded(model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """`model`, each part of it that is used as a whole gathered on its own.

    What a Sequential has that has parts.
    """
    # It takes longer to import than all of this library.
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("shard",))
    # FSDP2 takes no other memory order.
    nn.Module.to(model, memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # torch lacks this one
    chains = [part for part in model.modules() if isinstance(part, nn.Sequential)]
    for block in [
        block
        for chain in reversed(chains)
        for block in chain
        if any(True for _ in block.children())
    ]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model
