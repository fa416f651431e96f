"""The two merge rules behind most algorithms, and the outer step on the anchor.

x is a worker's local parameters, z the anchor (one identical copy on every worker), mean the mean
over the workers of what was sent. A rule says what a worker sends and how the finished mean meets
x; it knows neither steps nor processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distoptim.algorithms.outer import Outer
from distoptim.fragments import Flat, Fragment
from distoptim.rule import Mean, Rule, State


@dataclass
class Sent(State):
    """What was sent, which the mean replaces in the communication buffer."""

    sent: Flat


@dataclass(frozen=True)
class Average(Rule):
    """x <- mean where no local step lies between launch and merge, else x <- x + (mean - sent).

    The second form keeps the steps made meanwhile, and the workers' mean on Local SGD's trajectory
    at any delay.

    Args:
        carry: whether there are such steps, so that what was sent must be remembered.
    """

    carry: bool

    def start(self, fragment: Fragment) -> State:
        """The start as what was sent, or nothing."""
        if not self.carry:
            return State()
        state = Sent(fragment.flat())
        fragment.read(state.sent)
        return state

    def launched(self, fragment: Fragment, state: State, sent: Flat) -> None:
        """Remember what was sent."""
        if isinstance(state, Sent):
            state.sent.tensor.copy_(sent.tensor[: fragment.numel])

    def merge(self, fragment: Fragment, state: State, mean: Mean) -> None:
        """x <- mean, or x <- x + (mean - sent)."""
        if isinstance(state, Sent):
            mean.flat.tensor[: fragment.numel].sub_(state.sent.tensor)
            fragment.add(mean.flat)
        else:
            fragment.write(mean.flat)

    def fallback(self, state: State) -> Flat | None:
        """What was sent last."""
        return state.sent if isinstance(state, Sent) else None


@dataclass(frozen=True)
class Adopt(Rule):
    """x <- mean, beside the state of another rule."""

    def merge(self, fragment: Fragment, state: State, mean: Mean) -> None:
        """x <- mean."""
        fragment.write(mean.flat)


@dataclass
class Anchored(State):
    """An anchor and the optimizer that moves it.

    Attributes:
        anchor: z, bit-equal on all workers.
        outer: the outer optimizer; None where the step needs no memory.
        lr: inner learning rates, per segment, of the round merged last.
    """

    anchor: Flat
    outer: torch.optim.Optimizer | None = None
    lr: list[float] | None = None


class AnchorRule(Rule):
    """A rule with an anchor, moved without memory."""

    def start(self, fragment: Fragment) -> Anchored:
        """The start as anchor."""
        anchor = fragment.flat()
        fragment.read(anchor)
        return Anchored(anchor)

    def fallback(self, state: State) -> Flat | None:
        """The anchor."""
        assert isinstance(state, Anchored)
        return state.anchor


@dataclass(frozen=True)
class Pull(AnchorRule):
    """The anchor takes an outer step to the mean, then pulls the worker: x <- (1 - alpha) x + alpha
    z.

    The outer step is SGD on the pseudo-gradient z - mean:
    v <- outer_momentum v + (z - mean); z <- z - outer_lr v (or Nesterov's form of it).

    Args:
        alpha: weight of the anchor in the pull, in [0, 1]; 1 adopts the anchor and drops the local
            value.
        outer_lr: > 0.
        outer_momentum: in [0, 1).
        nesterov: restart from the point where momentum alone would go next.
        rescale: keep the momentum in units of the gradient: where the inner learning rate has
            changed since the last round, v is multiplied by the ratio (as in the code of
            Overlap-Local-SGD and SlowMo).
        outer: makes another outer optimizer than this SGD, whose settings then count instead of the
            four above.
    """

    alpha: float
    outer_lr: float
    outer_momentum: float
    nesterov: bool = False
    rescale: bool = True
    outer: Outer | None = None

    def start(self, fragment: Fragment) -> Anchored:
        """The start as anchor, momentum 0."""
        state = super().start(fragment)
        segments = [torch.nn.Parameter(state.anchor.tensor[s]) for _, s in fragment.segments]
        if self.outer is not None:
            state.outer = self.outer(segments)
        elif self.outer_momentum:
            # maximize and weight_decay=1 make z - mean out of a "gradient" that is the mean itself:
            # the communication buffer serves as .grad, and one fused kernel does the whole step.
            state.outer = torch.optim.SGD(
                segments,
                lr=self.outer_lr,
                momentum=self.outer_momentum,
                nesterov=self.nesterov,
                weight_decay=1.0,
                maximize=True,
                fused=fragment.device.type in ("cpu", "cuda"),
            )
        return state

    def merge(self, fragment: Fragment, state: State, mean: Mean) -> None:
        """z <- outer step; x <- (1 - alpha) x + alpha z."""
        assert isinstance(state, Anchored)
        self.move(fragment, state, mean)
        if self.alpha == 1:
            fragment.write(state.anchor)
        else:
            fragment.pull(state.anchor, self.alpha)

    def move(self, fragment: Fragment, state: Anchored, mean: Mean) -> None:
        """z <- outer step; overwrites the mean, unless the outer optimizer is SGD."""
        if state.outer is None:
            state.anchor.tensor.lerp_(mean.flat.tensor[: fragment.numel], self.outer_lr)
            return
        if self.outer is not None:
            pseudo_gradient = mean.flat.tensor[: fragment.numel]
            torch.sub(state.anchor.tensor, pseudo_gradient, out=pseudo_gradient)
        self._outer_step(fragment, state.outer, state.lr, mean)
        state.lr = list(mean.lr)

    def _outer_step(
        self,
        fragment: Fragment,
        outer: torch.optim.Optimizer,
        lr_before: list[float] | None,
        mean: Mean,
    ) -> None:
        anchors = outer.param_groups[0]["params"]
        for i, (z, (_, part)) in enumerate(zip(anchors, fragment.segments, strict=True)):
            z.grad = mean.flat.tensor[part]
            if (
                self.rescale
                and self.outer is None
                and lr_before is not None
                and lr_before[i] != mean.lr[i]
            ):
                # Momentum gathered at lr = 0 is none at all; dividing by it would make NaN.
                ratio = mean.lr[i] / lr_before[i] if lr_before[i] else 0.0
                outer.state[z]["momentum_buffer"].mul_(ratio)
        outer.step()
        for z in anchors:
            z.grad = None
