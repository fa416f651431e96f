"""The making of optimizers: where one worker's arguments are refused, the others hear of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from distoptim.comm import CommunicationError
from distoptim.comm.mesh import WorkerMesh
from distoptim.engine import membership
from distoptim.settings import SyncSettings


class ToldToAll(type):
    """Makes optimizers; where this worker's arguments are refused, the others hear of it."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        """Make one, as `type` does, or tell the others, who would wait for this worker, why not."""
        # Not by `type.__call__`: of an optimizer that is half made the communicator is needed below.
        optimizer: Any = object.__new__(cls)  # type: ignore[arg-type]  # a class it is
        try:
            # What can be read once is needed again to tell the others.
            args = tuple(list(x) if isinstance(x, Iterator) else x for x in args)
            optimizer.__init__(*args, **options)
        except CommunicationError:
            # Others are not here, or have heard.
            raise
        except Exception as error:
            if not hasattr(optimizer, "_communicator"):
                _tell_others(error, WorkerMesh(list(_tensors(args))), options)
            else:
                # If it is raised here alone (no memory, a rule of the user's), others hear of it so.
                optimizer._communicator.close()  # noqa: SLF001  # of the class that is made here
            raise
        return optimizer


def _tensors(params: Any) -> Iterator[Tensor]:
    """Of parameters in whatever form, those that would be averaged."""
    if isinstance(params, Tensor):
        if params.requires_grad:
            yield params
    elif isinstance(params, torch.optim.Optimizer):
        yield from _tensors(params.param_groups)
    elif isinstance(params, dict):
        yield from _tensors(params.get("params"))
    elif isinstance(params, list | tuple):
        for part in params:
            yield from _tensors(part)


def _tell_others(error: Exception, mesh: WorkerMesh, options: dict[str, Any]) -> None:
    """Refuse to take part, as far as the others can be found from mesh and options."""
    names = ("communicator", "group", "device_mesh", "timeout_s")
    # One of these may be what is wrong; then the others are looked for among all.
    given = {n: options[n] for n in names if n in options and _workers({n: options[n]})}
    if mesh.is_shared or _workers(given) > 1:
        settings = SyncSettings(tau=1, **given)
        membership.refuse(settings.connect, error, mesh)


def _workers(options: dict[str, Any]) -> int:
    """How many there are by these; 0 where they are refused."""
    try:
        return SyncSettings(tau=1, **options).workers()
    except (ValueError, TypeError):
        return 0
