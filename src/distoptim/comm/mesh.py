"""A worker made of a DeviceMesh: with whom a rank averages, and what the ranks of one worker decide
together."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distoptim.comm import control

REPLICATE = (
    "replicate",
    "dp_replicate",
)  # torch's documentation and torchtitan; torch itself prescribes no name


def averaging_group(
    group: dist.ProcessGroup | None,
    device_mesh: DeviceMesh | None,
    communicator: object | None,
) -> dist.ProcessGroup | None:
    """The group that is given, or that of the mesh's replicate dimension; None with a communicator
    of the user's, or for all workers.

    Raises:
        ValueError: two of the three are given, the mesh has no such dimension, or this rank is not
            in it.
    """
    if group is not None and communicator is not None:
        raise ValueError("group= beside communicator=: each says with whom to average; give one")
    if device_mesh is None:
        return group
    if group is not None or communicator is not None:
        raise ValueError(
            "device_mesh= beside group= or communicator=: each says with whom to average; give one"
        )
    if not isinstance(device_mesh, DeviceMesh):
        raise ValueError(f"device_mesh={device_mesh!r}: allowed is a torch.distributed DeviceMesh")
    names = device_mesh.mesh_dim_names or ()
    dims = (
        [0] if device_mesh.ndim == 1 else [d for d, name in enumerate(names) if name in REPLICATE]
    )
    if len(dims) != 1:
        raise ValueError(
            f"device_mesh has dimensions {names}: allowed is one dimension, or exactly one of several "
            f"called {' or '.join(REPLICATE)}; choose with device_mesh=mesh[name]"
        )
    if device_mesh.get_coordinate() is None:
        raise ValueError(f"device_mesh={device_mesh!r}: this rank is not in it")
    return device_mesh.get_group(dims[0])


def is_sharded(p: Tensor) -> bool:
    """Whether p is a DTensor; without importing it, which takes longer than all of this library."""
    return hasattr(p, "device_mesh") and hasattr(p, "to_local")


def local(p: Tensor) -> Tensor:
    """This rank's shard of a DTensor, as a view; any other tensor itself."""
    shard: Tensor = p.to_local() if is_sharded(p) else p  # type: ignore[attr-defined]  # a DTensor's
    return shard


def describe(params: Sequence[Tensor]) -> str:
    """Which shards these are: equal on ranks that may average with each other."""
    # Any, since what DTensors have, Tensors do not.
    sharded: list[Any] = [p for p in params if is_sharded(p)]
    return " ".join(
        f"{list(p.shape)} {p.placements} at {p.device_mesh.get_coordinate()} of "
        f"{tuple(p.device_mesh.shape)}"
        for p in sharded
    )


class WorkerMesh:
    """The ranks that are one worker together, because they hold the same DTensors.

    Args:
        params: parameters, of which DTensors tell the ranks; without any, this rank is a worker of
            its own.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        # A dictionary, since all ranks must have them in the same order.
        self._meshes: list[DeviceMesh] = list(
            dict.fromkeys(
                mesh for p in params if (mesh := getattr(p, "device_mesh", None)) is not None
            )
        )

    @property
    def coordinates(self) -> list[list[int]]:
        """Where this rank is in each of the meshes: which of the worker's shards it holds."""
        return [list(mesh.get_coordinate() or []) for mesh in self._meshes]

    @property
    def is_shared(self) -> bool:
        """Whether there are others."""
        return bool(self._groups)

    @functools.cached_property
    def _groups(self) -> list[dist.ProcessGroup]:
        """One per dimension of the meshes.

        What is reduced over each in turn is reduced over the worker.
        """
        return [
            mesh.get_group(d) for mesh in self._meshes for d in range(mesh.ndim) if mesh.size(d) > 1
        ]

    def everywhere(self, flag: Tensor) -> Tensor:
        """Whether the flag is true on all ranks of the worker; collective in it.

        Raises:
            CommunicationError: one is gone.
        """
        if not self._groups:
            return flag
        number = flag.to(torch.float32)
        for group in self._groups:
            with control.one_error("a check that all ranks of a worker are finite"):
                dist.all_reduce(number, op=dist.ReduceOp.MIN, group=group)
        return number > 0

    def all_gather_json(self, message: object, *, what: str = "") -> list[object]:
        """The message of every rank of the worker, as JSON; blocking and collective in it.

        Args:
            message: None, bool, int, float, str, and lists and dictionaries of them.
            what: the call that asks, for error messages.

        Raises:
            CommunicationError: ranks are in different calls, or one is gone.
        """
        messages = [message]
        for group in self._groups:
            with control.one_error(f"{what} inside a worker"):
                parts = cast(
                    "list[list[object]]", control.all_gather_json(messages, group, what=what)
                )
            messages = [m for part in parts for m in part]
        return messages

    def check(self, group: dist.ProcessGroup | None, measures: Sequence[str] = ()) -> None:
        """Whether `group` leads to other workers only, and the ranks of this one will launch
        together.

        Raises:
            ValueError: there is no group, it holds another rank of this worker, or tau follows what
                each rank measures.
        """
        if not self._meshes:
            return
        if measures and any(mesh.size() > 1 for mesh in self._meshes):
            raise ValueError(
                f"a parameter is a DTensor, and tau follows {' and '.join(measures)}: each rank of an "
                "island would choose a tau of its own; allowed are an integer, Schedule, and PostLocal "
                "with one of them"
            )
        if group is None:
            raise ValueError(
                "a parameter is a DTensor, whose shards lie on several ranks: with whom to average is "
                "said by device_mesh= (of which the replicate dimension is taken) or group="
            )
        mine = {rank for mesh in self._meshes for rank in mesh.mesh.flatten().tolist()} - {
            dist.get_rank()
        }
        if both := mine.intersection(dist.get_process_group_ranks(group)):
            raise ValueError(
                f"ranks {sorted(both)} share DTensors with this rank and are to average with it: allowed "
                "are ranks of other islands (shard over mesh['shard'], average over mesh['replicate'])"
            )
