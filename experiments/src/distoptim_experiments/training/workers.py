"""What the training loop asks of the workers, real or virtual."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from distoptim_experiments import records
from distoptim_experiments.machines import Machines
from distoptim_experiments.training.problem import Problem
from distoptim_experiments.training.world import Seat


class Workers(ABC):
    """Those workers of a run that this process holds, and their clock.

    Where a run has several processes, all methods but those that return times, costs and states are
    collective.

    Attributes:
        problem: what they learn.
        seat: this process's among those of the run; that of rank 0 writes the record.
        machines: the virtual machines; None for real ones.
    """

    problem: Problem
    seat: Seat
    machines: Machines | None = None

    @property
    @abstractmethod
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """Of the workers held here, for their learning rates."""

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Numbers in the model."""

    @abstractmethod
    def begin(self) -> None:
        """Be ready for the first step."""

    @abstractmethod
    def step(self, step: int) -> Sequence[float]:
        """Local step number `step` (from 0) of the workers held here, and their `average()`.

        With `equal_time` it is round number `step`, of as many local steps as fit.

        Returns: the losses of their batches.

        Raises:
            FloatingPointError: on all workers: none has finite parameters.
        """

    def reached(self, step: int) -> int:
        """The local step that the run has come to with the one of number `step`."""
        return step + 1

    def resumed(self, step: int) -> int:
        """The local step to go on from with a state of `step`, once it has been loaded."""
        return step

    def events(self) -> list[records.Line]:
        """What has happened since this was asked last, for the record; by default nothing does."""
        return []

    @abstractmethod
    def seconds(self) -> float:
        """What the training steps of the whole run have taken so far, and nothing beside them."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Losses and accuracies of the workers' mean, and their own accuracy; all ranks of worker 0
        get them."""

    @abstractmethod
    def verdict(self, losses: Sequence[float]) -> int:
        """The signal for which all stop after this step, or 0.

        Args:
            losses: of this step, of the workers held here.

        Raises:
            FloatingPointError: on all workers: no one's loss is finite.
        """

    @abstractmethod
    def so_far(self) -> dict[str, float | None]:
        """`exposed_share` and `tau` as fields of `records.Log`, without asking other processes."""

    @abstractmethod
    def totals(self) -> dict[str, Any]:
        """Where the time of the whole run went, as fields of `records.Summary`."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait for all processes."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What this process needs to go on bit-equal: tensors and plain data."""

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any], *, own: bool) -> None:
        """Go on from `state_dict()`.

        Args:
            state_dict: a process's.
            own: it is this one's, not another's, of a run with another number of workers.
        """

    @abstractmethod
    def close(self) -> None:
        """Leave the communication groups."""
