"""Workers of several ranks each.

They share a worker's batches and are one model together, by DDP or FSDP2.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from distoptim.comm.mesh import is_sharded, local
from distoptim_experiments.config import DDP, FSDP2, RunConfig
from distoptim_experiments.training.methods import NO_BUFFER_SYNC, Averaging


class IslandAveraging(Averaging):
    """An algorithm of `distoptim` between workers of `island_size` ranks, which average gradients
    at every step.

    Neighbouring ranks are a worker. Each trains on its part of the worker's batch, and averages
    what it holds, the whole model (DDP) or a shard (FSDP2), with the ranks at its place in the
    other workers. The emulated link lies between workers only. Batch norm sees a rank's part, and
    its statistics stay with the rank.
    """

    def __init__(self, model: nn.Module, config: RunConfig) -> None:
        self._place, self._size = dist.get_rank() % config.island_size, config.island_size
        ranks = torch.arange(config.ranks).view(config.workers, config.island_size)
        timeout = timedelta(seconds=config.timeout_s)
        self._inside = _group(ranks.tolist(), timeout, backend="gloo")
        module = (
            _sharded(model, self._inside)
            if config.island_kind == FSDP2
            else DistributedDataParallel(model, process_group=self._inside, **NO_BUFFER_SYNC)
        )
        super().__init__(model, config, module=module, group=_group(ranks.T.tolist(), timeout))

    def step(self, images: Tensor, labels: Tensor) -> float:
        """One step on this rank's part of the worker's batch; the loss is the worker's."""
        loss = super().step(
            images.chunk(self._size)[self._place], labels.chunk(self._size)[self._place]
        )
        total = torch.tensor(loss, dtype=torch.float64)
        dist.all_reduce(total, group=self._inside)
        return total.item() / self._size


def state_dict(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig
) -> dict[str, Any]:
    """Both as plain tensors.

    Of DTensors this rank's shards, whatever ranks the workers have when they resume.
    """
    whole = optimizer.state_dict()
    states = {i: {key: local(x) for key, x in state.items()} for i, state in whole["state"].items()}
    return {
        "model": {name: local(x) for name, x in model.state_dict().items()},
        "optimizer": {**whole, "state": states},
        "island_kind": config.island_kind,
    }


def load_state_dict(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig, saved: dict[str, Any]
) -> None:
    """Go on from `state_dict()`.

    Raises:
        ValueError: it holds other shards than this run has.
    """
    islands = [
        (saved.get("island_kind", DDP), saved.get("island_size", 1)),
        (config.island_kind, config.island_size),
    ]
    if islands[0] != islands[1] and FSDP2 in (islands[0][0], islands[1][0]):
        before, now = (f"island_kind={kind!r}, island_size={size}" for kind, size in islands)
        raise ValueError(
            f"{now}: the checkpoint has {before}; shards of FSDP2 go on in islands of one kind and size"
        )
    model.load_state_dict(
        {name: _like(saved["model"][name], x) for name, x in model.state_dict().items()}
    )
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = {
        i: {key: _like(x, params[i]) for key, x in state.items()}
        for i, state in saved["optimizer"]["state"].items()
    }
    optimizer.load_state_dict({**saved["optimizer"], "state": states})


def _like(x: Any, p: Tensor) -> Any:
    """A saved value as what it was; numbers, such as Adam's steps, are in no shards."""
    if not is_sharded(p) or not isinstance(x, Tensor) or not x.dim():
        return x
    from torch.distributed.tensor import DTensor

    assert isinstance(p, DTensor)
    return DTensor.from_local(
        x, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


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
