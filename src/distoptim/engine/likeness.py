"""Whether all workers send the same: then they have computed the same, and nothing is gained."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from distoptim.comm.communicator import Communicator
from distoptim.comm.compressed import CompressedMean
from distoptim.comm.data_parallel import averages_gradients
from distoptim.comm.process_group import ProcessGroupCommunicator

# Of a payload, so many elements: enough that no other worker's mean has them by chance.
_SAMPLE = 4096
# A mean of equal numbers is off by rounding where the number of workers is no power of 2.
_ROUNDINGS = 8


@final
class Likeness:
    """Compares what a worker sends in a few rounds with the mean that comes back.

    No message is needed: where all send the same, the mean is each one's own. Where a payload is as it
    was a round ago (nothing was trained) that says nothing.
    """

    def __init__(self) -> None:
        self._sent: Tensor | None = None
        self._before: Tensor | None = None

    def look(self, payload: Tensor) -> None:
        """Note what is about to be sent."""
        self._before = self._sent
        self._sent = payload[:: max(1, len(payload) // _SAMPLE)].clone()

    def compare(self, mean: Tensor, compressed: CompressedMean | None) -> bool:
        """Whether the mean of it has settled the question; warns if all send the same."""
        if self._sent is None:
            # In flight since before a checkpoint.
            return False
        if compressed is not None:
            # Codes lose something, so the mean is nobody's own; but they come one by one.
            alike = compressed.codes_are_equal()
        else:
            mean = mean[:: max(1, len(mean) // _SAMPLE)]
            allowed = _ROUNDINGS * torch.finfo(mean.dtype).eps * self._sent.abs()
            alike = bool(((mean - self._sent).abs() <= allowed).all())
        if not alike:
            return True
        if self._before is None or torch.equal(self._sent, self._before):
            return False
        warnings.warn(
            "all workers have sent equal parameters two rounds in a row: they compute the same, and "
            "averaging gains nothing. Give each its own share of the data; and put no "
            "DistributedDataParallel around the model, except over the ranks of one worker "
            "(device_mesh=)",
            RuntimeWarning,
            stacklevel=2,
        )
        return True


def look_for_ddp(params: Sequence[Tensor], communicator: Communicator) -> bool:
    """Warn, after a local step, if DDP keeps the workers equal; whether it does.

    Raises:
        ValueError: beside workers that come and go, where it would stop at the first that is lost.
    """
    if communicator.elastic and averages_gradients(params, None):
        raise ValueError(
            "DistributedDataParallel is around the model, beside workers that come and go (Elastic): its ranks "
            "wait for each other at every step, and for ever for one that is lost; allowed is the module "
            "inside: model = model.module, and a worker of one process"
        )
    # Others' workers may be no ranks of torch.distributed, but each a group with ranks of its own.
    if not isinstance(communicator, ProcessGroupCommunicator):
        return False
    if not averages_gradients(params, communicator.ranks):
        return False
    warnings.warn(
        "DistributedDataParallel is around the model: it averages the gradients of all workers at every "
        "step, so that they stay equal, every step waits, and averaging every tau steps gains nothing. "
        "Train the module inside: model = model.module. Where a trainer has put it there: "
        "distoptim.integrations.accelerate.prepare(accelerator, ...), transformers.AveragingTrainer, or "
        "lightning.AveragingStrategy (docs/trainers.md)",
        RuntimeWarning,
        stacklevel=3,
    )
    return True
