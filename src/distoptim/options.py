"""What all algorithms take, and the inner optimizer made of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import TypedDict

from distoptim import checks
from distoptim.comm import Communicator, world_size
from distoptim.comm.codecs import Coding
from distoptim.comm.mesh import averaging_group
from distoptim.fragments import Fragments

Params = (
    Iterable[Tensor]
    | Iterable[dict[str, Any]]
    | Iterable[tuple[str, Tensor]]
    | torch.optim.Optimizer
)


class Options(TypedDict, total=False):
    """The keyword arguments that all algorithms take; see `AveragingOptimizer`."""

    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    size: int | None
    group: dist.ProcessGroup | None
    device_mesh: DeviceMesh | None
    levels: Mapping[int, dist.ProcessGroup] | None
    communicator: Communicator | None
    fragments: Fragments
    pattern: str
    timeout_s: float
    average_in_step: bool
    reset_inner: bool
    codec: Coding | str | None


def workers(options: Options | dict[str, Any]) -> int:
    """How many workers an optimizer with these options will have.

    Raises:
        ValueError: the communicator is none, or group or mesh are of other workers.
    """
    communicator = options.get("communicator")
    group = averaging_group(options.get("group"), options.get("device_mesh"), communicator)
    if communicator is None:
        size = world_size(group)
        if size < 1:
            raise ValueError(f"group={group!r}: this worker is not a member of it")
        return size
    if not isinstance(communicator, Communicator):
        raise ValueError(
            f"communicator={communicator!r}: allowed is an object with the methods of "
            "distoptim.comm.Communicator"
        )
    return communicator.size


def check_size(size: int | None, actual: int) -> None:
    """Compare the original code's `size` with the workers there are.

    Raises:
        ValueError: they differ.
    """
    if size is not None and checks.integer("size", size, 1) != actual:
        raise ValueError(f"size={size}, but the process group has {actual} workers")


def inner_optimizer(params: Params, **given: Any) -> torch.optim.Optimizer:
    """The optimizer that is given, or an SGD over the parameters with what is not None of the rest.

    Raises:
        ValueError: a value outside its range, or one beside an optimizer.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if isinstance(params, torch.optim.Optimizer):
        if given:
            raise ValueError(
                f"{', '.join(given)}: belongs to the optimizer that was given; set it there"
            )
        return params
    for name, value in given.items():
        if name == "nesterov":
            checks.flag(name, value)
        elif name == "lr" and isinstance(value, Tensor):
            # Stays a tensor: a compiled step reads it anew each time.
            checks.number(name, value.item() if value.numel() == 1 else value, 0, checks.LARGEST)
        else:
            given[name] = checks.number(
                name, value, 0 if name != "dampening" else -checks.LARGEST, checks.LARGEST
            )
    return torch.optim.SGD(params, **given)
