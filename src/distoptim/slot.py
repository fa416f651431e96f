"""What the engine keeps of each fragment: its buffer and what is in flight of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distoptim.algorithms.rule import State
from distoptim.coder import Coder
from distoptim.comm.communicator import Handle
from distoptim.fragments import Flat, Fragment


class QuarantineWarning(RuntimeWarning):
    """This worker's parameters were not finite: left out of a mean and replaced."""


@dataclass
class Flight:
    """One launched mean.

    Attributes:
        handle: the collective, or a finished one where none is needed (the start, a mean from a checkpoint).
        finite: on the host, whether this worker's payload was; valid once the handle has been waited for.
        due: the local step of the merge.
        lr: inner learning rates at the launch, per segment.
    """

    handle: Handle
    finite: Tensor
    due: int
    lr: list[float]


@dataclass
class Slot:
    """A fragment, its algorithm's state, its communication buffer, the steps of its launches and its flight.

    The buffer has one element more than the fragment: the worker's weight, so that
    mean = sum of weighted payloads / sum of weights.
    """

    index: int
    fragment: Fragment
    state: State
    buffer: Flat
    next_launch: int
    launched: int = 0
    flight: Flight | None = None
    coder: Coder | None = None

    @property
    def shared(self) -> Tensor | None:
        """The anchor, which all workers share, if there is one."""
        anchor = getattr(self.state, "anchor", None)
        return anchor.tensor if isinstance(anchor, Flat) else None

    @property
    def nbytes(self) -> int:
        """Size of a message: of the code if there is one, else of the buffer."""
        return self.buffer.nbytes if self.coder is None else self.coder.nbytes


def weigh(buffer: Tensor, fragment: Fragment) -> Tensor:
    """Set the last element to 1 if all are finite, else everything to 0; return which. A sum that overflows is not.

    All ranks of an island decide alike: a worker of which one shard were missing would be torn apart.
    """
    buffer[-1] = 0
    total = buffer.sum()
    if buffer.device.type == "cpu":
        finite = fragment.island.everywhere(torch.tensor(math.isfinite(total)))
        if not finite:
            buffer.zero_()
    else:
        finite = fragment.island.everywhere(torch.isfinite(total))
        buffer.copy_(torch.where(finite, buffer, 0.0))
    buffer[-1] = finite
    return finite
