"""Bytes: what moves between workers; buffers, never fragments.

Of the library, only this package, the integrations and the testing harness import
torch.distributed.
"""

from __future__ import annotations

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from distoptim.comm.codecs import Codec, ErrorFeedback, TopK, register_codec
from distoptim.comm.communicator import (
    CommunicationError,
    Communicator,
    MeanLost,
    Member,
    SingleWorker,
)
from distoptim.comm.elastic import Elastic
from distoptim.comm.emulated import emulate
from distoptim.comm.handles import CatchUp, FinishedHandle, Handle
from distoptim.comm.link import Link
from distoptim.comm.process_group import (
    ProcessGroupCommunicator,
    connect,
    forgotten,
    ranks_of,
    world_size,
)

__all__ = [
    "CatchUp",
    "Codec",
    "CommunicationError",
    "Communicator",
    "DeviceMesh",
    "Elastic",
    "ErrorFeedback",
    "FinishedHandle",
    "Handle",
    "Link",
    "MeanLost",
    "Member",
    "ProcessGroup",
    "ProcessGroupCommunicator",
    "SingleWorker",
    "TopK",
    "connect",
    "emulate",
    "forgotten",
    "ranks_of",
    "register_codec",
    "world_size",
]
