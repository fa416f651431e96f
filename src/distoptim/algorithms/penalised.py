"""The late anchor of CO2.

A momentum whose news are divided by a gap and whose elements are bounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distoptim.algorithms.rules import Anchored, AnchorRule
from distoptim.chunks import CHUNK, pieces
from distoptim.fragments import Flat, Fragment
from distoptim.rule import Mean, State


@dataclass
class Gap(Anchored):
    """The anchor and its momentum.

    How far it moved last, and the farthest it ever did (Euclidean).
    """

    momentum: Flat | None = None
    moved: float = 0.0
    farthest: float = 0.0


@dataclass(frozen=True)
class Penalised(AnchorRule):
    """At the launch x <- z.

    At the merge m <- clip(beta m + (z - mean)/gap), and z and x both move by -outer_lr m.
    """

    outer_lr: float
    outer_momentum: float
    clip: float

    def start(self, fragment: Fragment) -> Gap:
        """The start as anchor, momentum 0."""
        return Gap(super().start(fragment).anchor, momentum=fragment.flat())

    def launched(self, fragment: Fragment, state: State, sent: Flat) -> None:
        """x <- z; what the round before has added comes back in the mean."""
        assert isinstance(state, Gap)
        fragment.write(state.anchor)

    def merge(self, fragment: Fragment, state: State, mean: Mean) -> None:
        """m <- clip(beta m + (z - mean)/gap); z <- z - outer_lr m; x <- x - outer_lr m."""
        assert isinstance(state, Gap)
        assert state.momentum is not None
        gap = 1 + state.moved / state.farthest if state.farthest else 1.0
        norms: list[Tensor] = []
        for z, m, g in pieces(
            state.anchor.tensor, state.momentum.tensor, mean.flat.tensor[: fragment.numel]
        ):
            torch.sub(z, g, out=g)
            m.mul_(self.outer_momentum).add_(g, alpha=1 / gap).clamp_(-self.clip, self.clip)
            z.sub_(m, alpha=self.outer_lr)
            # Pieces depend on a rank's threads; how the sum behind the gap is rounded must not.
            norms += torch._foreach_norm(torch.split(m, CHUNK))
        fragment.add(state.momentum, weight=-self.outer_lr)
        state.moved = self.outer_lr * float(torch.stack(norms).norm())
        state.farthest = max(state.farthest, state.moved)
