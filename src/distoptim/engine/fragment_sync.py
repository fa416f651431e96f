"""What the engine keeps of each fragment: its buffer and what is in flight of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distoptim.comm.compressed import CompressedMean
from distoptim.comm.handles import Handle
from distoptim.fragments import Flat, Fragment
from distoptim.rule import State


class QuarantineWarning(RuntimeWarning):
    """This worker's parameters were not finite: left out of a mean and replaced."""


@dataclass
class Flight:
    """One launched mean.

    Attributes:
        handle: the collective, or a finished one where none is needed (the start, a mean from a
            checkpoint).
        finite: on the host, whether this worker's payload was; valid once the handle has been
            waited for.
        due: the local step of the merge.
        lr: inner learning rates at the launch, per segment.
    """

    handle: Handle
    finite: Tensor
    due: int
    lr: list[float]


@dataclass
class Slot:
    """A fragment, its algorithm's state, its communication buffer, its launches, merges and flight.

    The buffer has one element more than the fragment, the worker's weight, so that mean = sum of
    weighted payloads / sum of weights; before it, in the first slot, what the worker has measured
    for the period.
    """

    index: int
    fragment: Fragment
    state: State
    buffer: Flat
    next_launch: int
    extra: int = 0
    launched: int = 0
    merges: int = 0
    seconds: float = 0.0
    samples: float = 0.0
    flight: Flight | None = None
    coder: CompressedMean | None = None

    @property
    def shared(self) -> Tensor | None:
        """The anchor, which all workers share, if there is one."""
        anchor = getattr(self.state, "anchor", None)
        return anchor.tensor if isinstance(anchor, Flat) else None

    @property
    def nbytes(self) -> int:
        """Size of a message: of the code if there is one, else of the buffer."""
        return self.buffer.nbytes if self.coder is None else self.coder.nbytes
