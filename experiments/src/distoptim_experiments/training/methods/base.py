"""What the training loop asks of a method, and what communication costs it."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Costs:
    """What communication has cost this worker; see `records.Summary`."""

    exposed_s: float = 0.0
    overhead_s: float | None = 0.0
    hidden_s: float | None = 0.0
    bytes: int = 0
    syncs: int = 0

    def __add__(self, other: Costs) -> Costs:
        """Both together; what one of them did not measure is unknown."""
        return Costs(
            self.exposed_s + other.exposed_s,
            _sum(self.overhead_s, other.overhead_s),
            _sum(self.hidden_s, other.hidden_s),
            self.bytes + other.bytes,
            self.syncs + other.syncs,
        )

    def exposed_share(self, seconds: float) -> float | None:
        """Exposed communication as a share of the computation in so many seconds; None where there was none."""
        computation_s = seconds - self.exposed_s - (self.overhead_s or 0.0)
        return self.exposed_s / computation_s if computation_s > 0 else None


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


class Method(ABC):
    """A model in training on one rank.

    Attributes:
        optimizer: what makes the local steps; its learning rate is set from outside.
    """

    optimizer: torch.optim.Optimizer

    @abstractmethod
    def step(self, images: Tensor, labels: Tensor) -> float:
        """Train on one batch; returns its loss."""

    @abstractmethod
    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within it the model is the workers' mean; entering is collective."""

    @abstractmethod
    def costs(self) -> Costs:
        """What communication has cost this worker since this object was made."""

    @property
    def rounds(self) -> int:
        """How many are over, where it has some."""
        return 0

    def stats(self) -> dict[str, float]:
        """What it tells of its rounds, where it has some: tau, staleness, quarantined."""
        return {}

    def so_far(self, costs: Costs, seconds: float) -> dict[str, float | None]:
        """`exposed_share` and `tau` as fields of `records.Log`, of a run that has cost so much."""
        return {"exposed_share": costs.exposed_share(seconds), "tau": self.stats().get("tau")}

    def state_dict(self) -> dict[str, Any]:
        """What this worker needs to go on, besides model and optimizer."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027  # most have nothing
        """Go on from `state_dict()` of the same worker."""

    def close(self) -> None:  # noqa: B027  # not all have something to leave
        """Leave the communication groups of its own."""


def batch_loss(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Any:
    """Cross-entropy of a batch, under autocast if `dtype` is bfloat16."""
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        return nn.functional.cross_entropy(model(images), labels)
