"""Restarting from an anchor that is one round old.

The steps of a round come back in the next mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distoptim.algorithms.carry import Carried, Carry, based
from distoptim.chunks import pieces
from distoptim.fragments import Flat, Fragment
from distoptim.rule import State


@dataclass(frozen=True)
class Late(Carry):
    """Every round restarts from the anchor known at its launch; the steps of a round come back in
    the next mean.

    At the launch, with g = z - sent, this round's own pseudo-gradient:
    x <- z - share * (outer step of the worker's own g, with its own momentum).

    Shared anchor and outer momentum see exact means only, so they are bit-equal on all workers;
    what a worker adds of its own never enters them.

    Args:
        share: of the worker's own fresh pseudo-gradient, in [0, 1]; 0 for the anchor alone, 1/m for
            Eager DiLoCo.
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
        if isinstance(state, Eager) and state.own is not None:
            self._own_step(
                state.anchor.tensor,
                sent.tensor[: fragment.numel],
                state.own.tensor,
                based(state).tensor,
                sent.tensor[-1],
            )
        else:
            based(state).tensor.copy_(state.anchor.tensor)
        fragment.write(based(state))

    def _own_step(
        self, anchor: Tensor, sent: Tensor, own: Tensor, base: Tensor, weight: Tensor
    ) -> None:
        """U <- beta u + g; base <- z - share outer_lr (g + beta u), or classic.

        Z - share outer_lr u.
        """
        # The weight, 0 or 1, keeps a payload that was not finite out of the momentum; only on the
        # CPU it can be read without waiting.
        finite = weight.device.type == "cpu" and weight == 1
        for z, x, u, g in pieces(anchor, sent, own, base):
            torch.sub(z, x, out=g)
            if not finite:
                g.mul_(weight)
            torch.add(g, u, alpha=self.outer_momentum, out=u)
            step = g.add_(u, alpha=self.outer_momentum) if self.nesterov else u
            torch.sub(z, step, alpha=self.share * self.outer_lr, out=g)

    def fallback(self, state: State) -> Flat | None:
        """Where it restarted last: a merge makes the anchor of that. After the merge, anything.

        A launch follows.
        """
        return based(state)


@dataclass
class Eager(Carried):
    """The same, and the momentum of the worker's own pseudo-gradients.

    The only part that differs between workers.
    """

    own: Flat | None = None
