"""Adopting an anchor that comes late, without losing the local steps made meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distoptim import checks
from distoptim.algorithms.rule import Mean, State
from distoptim.algorithms.rules import Anchored, Pull
from distoptim.fragments import Flat, Fragment


@dataclass
class Carried(Anchored):
    """An anchor, and where the worker stood right after its last launch: steps made since are x - base."""

    base: Flat | None = None


@dataclass(frozen=True)
class Carry(Pull):
    """Adopt the anchor and keep the local steps made since the launch: x <- z + (x - sent).

    At delay 0 there are none, and this is `Pull` with alpha = 1.
    """

    def start(self, fragment: Fragment) -> Carried:
        """The start as anchor, and as what was sent."""
        plain = super().start(fragment)
        base = fragment.flat()
        base.tensor.copy_(plain.anchor.tensor)
        return Carried(plain.anchor, plain.outer, plain.lr, base)

    def launched(self, fragment: Fragment, state: State, sent: Flat) -> None:
        """Remember what was sent, or the anchor where the weight, 0 or 1, says that it was not finite."""
        assert isinstance(state, Anchored)
        torch.lerp(state.anchor.tensor, sent.tensor[: fragment.numel], sent.tensor[-1], out=based(state).tensor)

    def merge(self, fragment: Fragment, state: State, mean: Mean) -> None:
        """z <- outer step; x <- z + (x - base)."""
        assert isinstance(state, Anchored)
        self.move(fragment, state, mean)
        torch.sub(state.anchor.tensor, based(state).tensor, out=mean.flat.tensor[: fragment.numel])
        fragment.add(mean.flat)


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


def adopting(rule: Pull, *, delay: int, carry: bool) -> Pull:
    """A rule that adopts the anchor, fit for the delay.

    Raises:
        ValueError: a delay without `carry`, which would throw away the local steps made meanwhile.
    """
    checks.integer("delay", delay, 0)
    if not checks.flag("carry", carry) and delay:
        raise ValueError(f"delay={delay} without carry: adopting a late anchor throws away the local steps made "
                         "meanwhile; use delay=0, or carry=True, which keeps them, or OverlapLocalSGD, which pulls "
                         "instead")
    return Carry(**vars(rule)) if delay else rule


def based(state: State) -> Flat:
    """The base of a carried state."""
    assert isinstance(state, Carried)
    assert state.base is not None
    return state.base
