"""The learning rate over a run: warm-up, then constant, in steps or along a cosine."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field

from distoptim_experiments.settings import Settings

Kind = Literal["constant", "steps", "cosine"]


class Schedule(Settings):
    """Local step -> what the peak learning rate is multiplied with; it has no state that a
    checkpoint could lose.

    Warm-up rises linearly from 1/workers, where one worker alone would be, to 1 (arXiv 1706.02677,
    section 2.2).

    Attributes:
        kind: "cosine" falls to 0 at the last step.
        steps: local steps of the whole run.
        warmup: local steps until the peak.
        workers: of the run.
        milestones: local steps at which "steps" multiplies by `decay`.
        decay: in (0, 1].
    """

    kind: Kind
    steps: int
    warmup: int = 0
    workers: int = 1
    milestones: Annotated[tuple[int, ...], Field(strict=False)] = ()
    decay: float = 0.1

    def set(self, optimizer: torch.optim.Optimizer, step: int, peak: float) -> None:
        """Give all param groups the learning rate of local step `step`.

        `peak` is that at the factor 1.
        """
        for group in optimizer.param_groups:
            group["lr"] = peak * self(step)

    def __call__(self, step: int) -> float:
        """The factor for local step `step`, from 0."""
        if step < self.warmup:
            return 1 / self.workers + (1 - 1 / self.workers) * step / self.warmup
        if self.kind == "cosine":
            done = (step - self.warmup) / max(1, self.steps - self.warmup)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        if self.kind == "steps":
            return float(self.decay ** sum(step >= milestone for milestone in self.milestones))
        return 1.0
