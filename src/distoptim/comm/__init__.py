"""Bytes: what moves between workers, and the only place that imports torch.distributed."""

from __future__ import annotations

import warnings

import torch.distributed as dist

from distoptim.comm.communicator import CommunicationError, Communicator, Handle, SingleWorker
from distoptim.comm.link import Link, emulate
from distoptim.comm.process_group import ProcessGroupCommunicator, world_size

__all__ = [
    "CommunicationError",
    "Communicator",
    "Handle",
    "Link",
    "ProcessGroupCommunicator",
    "SingleWorker",
    "connect",
    "emulate",
    "world_size",
]


def connect(group: dist.ProcessGroup | None = None, timeout_s: float = 1800.0) -> Communicator:
    """A communicator over `group` (None: all workers).

    With one worker, or no process group, one that is alone.
    """
    if world_size(group) > 1:
        return ProcessGroupCommunicator(group, timeout_s=timeout_s)
    warnings.warn(
        "one worker: there is nobody to average with (is torch.distributed initialised, before the "
        "optimizer is made?)",
        RuntimeWarning,
        stacklevel=4,
    )
    return SingleWorker()
