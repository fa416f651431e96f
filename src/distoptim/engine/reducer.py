"""Blocking on collectives.

Bounded waits, one error for all ways in which they fail, and leaving in order.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import NoReturn

import torch
from torch import Tensor
from torch.profiler import record_function

from distoptim.comm.communicator import CommunicationError, Communicator
from distoptim.comm.handles import Handle
from distoptim.engine import packing
from distoptim.engine.fragment_sync import Slot
from distoptim.fragments import Flat, Fragment

logger = logging.getLogger("distoptim")


class Collectives(ABC):
    """A communicator that is given up for good at the first failure, and what is in flight over it.

    Args:
        communicator: moves the bytes.
        timeout_s: bound of every wait, in seconds.
    """

    def __init__(self, communicator: Communicator, timeout_s: float) -> None:
        self.communicator, self.timeout_s = communicator, timeout_s
        self.failure: CommunicationError | None = None
        self.evaluating = False
        self.slots: list[Slot] = []
        self._flying: list[Slot] = []

    @abstractmethod
    def _plan(self) -> None:
        """Note what is in flight."""

    def check_local(self) -> None:
        """Whether parameters are the worker's own.

        Raises:
            RuntimeError: they are the workers' mean, and what is done to them would be lost.
        """
        if self.evaluating:
            raise RuntimeError(
                "inside averaged() parameters are the workers' mean, and local again after it; train "
                "outside of the block"
            )

    @torch.no_grad()
    def mean_of(
        self, fragment: Fragment, weight: float = 1.0, *, may_be_empty: bool = False
    ) -> Flat:
        """The workers' weighted mean of a fragment's values now, in a new buffer; blocking and
        collective.

        Its last element is 1, or 0 where all weights are and that may be.
        """
        self._check()
        flat = fragment.flat(extra=1)
        fragment.read(flat)
        packing.weigh(flat.tensor, fragment)
        if weight != 1:
            flat.tensor.mul_(weight)
        handle = self._start(flat.tensor)
        self._wait(handle)
        packing.normalise(flat.tensor, handle, "all parameters", may_be_empty=may_be_empty)
        return flat

    def close(self) -> None:
        """Wait for what is in flight, then leave the communicator; what comes after fails."""
        self.settle()
        self.communicator.close()
        self.failure = self.failure or CommunicationError("the optimizer has been closed")

    def settle(self) -> None:
        """Wait for what is in flight without merging it.

        A failure is kept for the next step, not raised.
        """
        for slot in list(self._flying):
            if slot.flight is not None:
                try:
                    self._wait(slot.flight.handle, slot)
                except CommunicationError:
                    logger.warning("a mean in flight is lost: %s", self.failure)
                    return

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _start(self, buffer: Tensor, slot: Slot | None = None) -> Handle:
        try:
            if slot is not None and slot.coder is not None:
                return slot.coder.start(buffer)
            return self.communicator.all_reduce(buffer)
        except RuntimeError as error:
            self._fail(slot, 0.0, error)

    def _wait(self, handle: Handle, slot: Slot | None = None) -> None:
        try:
            with record_function("distoptim::wait"):
                handle.wait(self.timeout_s)
        except RuntimeError as error:
            self._fail(slot, self.communicator.now() - handle.launched_at, error)

    def _fail(self, slot: Slot | None, seconds: float, error: Exception) -> NoReturn:
        """Give up communication for good, keeping parameters and state.

        Peers see our groups close.
        """
        self.failure = CommunicationError(
            f"rank {self.communicator.rank}: mean of {packing.name_of(slot)} failed {seconds:.1f} s after its launch "
            f"(timeout {self.timeout_s:g} s): {error}. Parameters and anchor are valid: save them, and restart "
            "with the workers that are left"
        )
        for other in self.slots:
            other.flight = None
        self._plan()
        self.communicator.close()
        raise self.failure from error
