"""Adopting an anchor that comes late, without losing the local steps made meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distoptim import checks
from distoptim.algorithms.rules import Anchored, Pull
from distoptim.fragments import Flat, Fragment
from distoptim.rule import Mean, State


@dataclass
class Carried(Anchored):
    """An anchor and, until the merge, where the worker stood at its last launch.

    Steps made since are x - base.
    """

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
        """Remember what was sent, or the anchor where that was not finite."""
        assert isinstance(state, Anchored)
        base, payload = based(state).tensor, sent.tensor[: fragment.numel]
        if fragment.device.type == "cpu":
            # A worker that was not finite has been put back to the anchor.
            base.copy_(payload)
        else:
            # Only the weight, 0 or 1, says so: the host does not know yet.
            torch.lerp(state.anchor.tensor, payload, sent.tensor[-1], out=base)

    def merge(self, fragment: Fragment, state: State, mean: Mean) -> None:
        """z <- outer step; x <- z + (x - base)."""
        assert isinstance(state, Anchored)
        self.move(fragment, state, mean)
        # In place of the base, which the next launch replaces.
        torch.sub(state.anchor.tensor, based(state).tensor, out=based(state).tensor)
        fragment.add(based(state))


def adopting(rule: Pull, *, delay: int, carry: bool) -> Pull:
    """A rule that adopts the anchor, fit for the delay.

    Raises:
        ValueError: a delay without `carry`, which would throw away the local steps made meanwhile.
    """
    checks.integer("delay", delay, 0)
    if not checks.flag("carry", carry) and delay:
        raise ValueError(
            f"delay={delay} without carry: adopting a late anchor throws away the local steps made "
            "meanwhile; use delay=0, or carry=True, which keeps them, or OverlapLocalSGD, which pulls "
            "instead"
        )
    return Carry(**vars(rule)) if delay else rule


def based(state: State) -> Flat:
    """The base of a carried state."""
    assert isinstance(state, Carried)
    assert state.base is not None
    return state.base
