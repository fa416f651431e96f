"""Restarting from an anchor that is one round old; the steps of a round come back in the next mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distoptim.algorithms.carry import Carried, Carry, based
from distoptim.algorithms.rule import State
from distoptim.fragments import Flat, Fragment


@dataclass(frozen=True)
class Late(Carry):
    """Every round restarts from the anchor known at its launch; the steps of a round come back in the next mean.

    At the launch, with g = z - sent, this round's own pseudo-gradient:
    x <- z - share * (outer step of the worker's own g, with its own momentum).

    Shared anchor and outer momentum see exact means only, so they are bit-equal on all workers; what a worker adds
    of its own never enters them.

    Args:
        share: of the worker's own fresh pseudo-gradient, in [0, 1]; 0 for the anchor alone, 1/m for Eager DiLoCo.
    """

    share: float = 0.0

    def start(self, fragment: Fragment) -> Carried:
        """The start as anchor and base, own momentum 0."""
        state = super().start(fragment)
        if not self.share:
            return state
        return Eager(state.anchor, state.outer, state.lr, state.base, fragment.flat())

    def launched(self, fragment: Fragment, state: State, sent: Flat) -> None:
        """X <- z - share (outer step of the worker's own g)."""
        assert isinstance(state, Carried)
        base, anchor = based(state).tensor, state.anchor.tensor
        if isinstance(state, Eager) and state.own is not None:
            # The weight, 0 or 1, keeps a payload that was not finite out of the momentum without waiting for it.
            torch.sub(anchor, sent.tensor[: fragment.numel], out=base).mul_(sent.tensor[-1])
            own = state.own.tensor.mul_(self.outer_momentum).add_(base)
            step = base.add_(own, alpha=self.outer_momentum) if self.nesterov else base.copy_(own)
            step.mul_(-self.share * self.outer_lr).add_(anchor)
        else:
            base.copy_(anchor)
        fragment.write(based(state))

    def fallback(self, state: State) -> Flat | None:
        """Where it restarted last: the next merge makes the anchor of that."""
        return based(state)


@dataclass
class Eager(Carried):
    """The same, and the momentum of the worker's own pseudo-gradients; the only part that differs between workers."""

    own: Flat | None = None
