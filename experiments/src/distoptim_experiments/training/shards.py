"""Model and optimizer of a rank as plain tensors, whole or shards of FSDP2, for its checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distoptim.comm.mesh import is_sharded, local
from distoptim_experiments.config import FSDP2, RunConfig


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
        "island_size": config.island_size,
    }


def load_state_dict(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig, saved: dict[str, Any]
) -> None:
    """Go on from `state_dict()`.

    Raises:
        ValueError: it holds other shards than this run has.
    """
    before = (saved["island_kind"], saved["island_size"])
    now = (config.island_kind, config.island_size)
    if before != now and FSDP2 in (before[0], now[0]):
        raise ValueError(
            f"{_said(*now)}: the checkpoint has {_said(*before)}; shards of FSDP2 go on in islands of "
            "one kind and size"
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


def _said(kind: str, size: int) -> str:
    return f"island_kind={kind!r}, island_size={size}"


def _like(x: Any, p: Tensor) -> Any:
    """A saved value as what it was; numbers, such as Adam's steps, are in no shards."""
    if not is_sharded(p) or not isinstance(x, Tensor) or not x.dim():
        return x
    from torch.distributed.tensor import DTensor

    assert isinstance(p, DTensor)
    return DTensor.from_local(
        x, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
