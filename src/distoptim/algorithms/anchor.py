"""The anchor: the outer step that moves it to the mean, and how the local parameters follow it.

The outer step is any torch optimizer on the pseudo-gradient z - mean. x follows by a pull,
x <- (1 - alpha) x + alpha z, or by a carry, x <- z + (x - sent), which keeps the local steps made since
the launch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch

from distoptim import checks
from distoptim.fragments import Flat, Fragment
from distoptim.rule import Mean, Rule, State

OuterFactory = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


@dataclass
class AnchorState(State, ABC):
    """An anchor and the optimizer that moves it; equal on all workers. Subclasses add what is not.

    Attributes:
        anchor: z, bit-equal on all workers.
        outer: the outer optimizer; None where the step needs no memory.
        lr: inner learning rates, per segment, of the round merged last; None where nothing follows them.
    """

    anchor: Flat
    outer: torch.optim.Optimizer | None = None
    lr: list[float] | None = None

    def unfit(self, fragment: Fragment, saved: Mapping[str, Any]) -> str | None:
        """The learning rates are one per segment, and there is memory of the step that had them."""
        lr = saved["lr"]
        if lr is None:
            return None
        count = len(fragment.segments)
        numbers = isinstance(lr, list | tuple) and all(isinstance(x, int | float) for x in lr)
        if not numbers or len(lr) != count:
            return f"lr is {lr!r}: allowed is a list of {count} numbers"
        if self.outer is not None and not saved["outer"]["state"]:
            return (
                "outer remembers nothing: allowed is the memory of a step that was made, as lr says"
            )
        return None


@final
@dataclass
class Anchored(AnchorState):
    """Nothing else."""


@dataclass(kw_only=True)
class BaseState(AnchorState, ABC):
    """And until the merge where x stood at its last launch: steps since are x - base."""

    base: Flat


@final
@dataclass(kw_only=True)
class Carried(BaseState):
    """Nothing else."""


def start_anchor(fragment: Fragment) -> Flat:
    """z <- x."""
    anchor = fragment.flat()
    fragment.read(anchor)
    return anchor


def start_base(anchor: Flat, fragment: Fragment) -> Flat:
    """What was sent at the start: the anchor."""
    base = fragment.flat()
    base.tensor.copy_(anchor.tensor)
    return base


def shared_fields(state: State) -> Mapping[str, Any]:
    """Of an `AnchorState`, what is equal on all workers: not what subclasses add."""
    assert isinstance(state, AnchorState)
    return {"anchor": state.anchor, "outer": state.outer, "lr": state.lr}


def carry_over(fragment: Fragment, state: BaseState) -> None:
    """x <- z + (x - base)."""
    base = state.base
    # In place of the base, which the next launch replaces.
    torch.sub(state.anchor.tensor, base.tensor, out=base.tensor)
    fragment.add(base)


class OuterStep(ABC):
    """How the anchor moves to the mean."""

    @property
    def follows_lr(self) -> bool:
        """As `Rule.follows_lr`."""
        return False

    @abstractmethod
    def optimizer(self, anchors: list[torch.nn.Parameter]) -> torch.optim.Optimizer | None:
        """The optimizer of one fragment's anchors, one per segment; None if none is needed."""

    @abstractmethod
    def step(self, fragment: Fragment, state: AnchorState, mean: Mean) -> None:
        """z <- outer step on z - mean; may overwrite the mean."""

    def start(self, fragment: Fragment) -> tuple[Flat, torch.optim.Optimizer | None]:
        """The start as anchor, and its optimizer, whose momentum is 0."""
        anchor = start_anchor(fragment)
        segments = [torch.nn.Parameter(anchor.tensor[part]) for _, part in fragment.segments]
        return anchor, self.optimizer(segments)


@final
@dataclass(frozen=True)
class OuterSGD(OuterStep):
    """v <- momentum v + (z - mean); z <- z - lr v (or Nesterov's form of it).

    Args:
        lr: > 0.
        momentum: in [0, 1).
        nesterov: restart from the point where momentum alone would go next.
        rescale: keep the momentum in units of the gradient: where the inner learning rate has changed
            since the last round, v is multiplied by the ratio (as in the code of Overlap-Local-SGD and
            SlowMo).
    """

    lr: float
    momentum: float
    nesterov: bool = False
    rescale: bool = False

    @property
    def follows_lr(self) -> bool:
        """Where a momentum is rescaled."""
        return self.rescale and self.momentum > 0

    def optimizer(self, anchors: list[torch.nn.Parameter]) -> torch.optim.Optimizer | None:
        """torch's SGD; without momentum the step needs no memory."""
        if not self.momentum:
            return None
        # maximize and weight_decay=1 make z - mean out of a "gradient" that is the mean itself: the
        # communication buffer serves as .grad, and one fused kernel does the whole step.
        return torch.optim.SGD(
            anchors,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=1.0,
            maximize=True,
            fused=anchors[0].device.type in ("cpu", "cuda"),
        )

    def step(self, fragment: Fragment, state: AnchorState, mean: Mean) -> None:
        """The mean is left as it is."""
        if state.outer is None:
            state.anchor.tensor.lerp_(mean.flat.tensor[: fragment.numel], self.lr)
            return
        anchors = state.outer.param_groups[0]["params"]
        before = state.lr
        for i, (z, (_, part)) in enumerate(zip(anchors, fragment.segments, strict=True)):
            z.grad = mean.flat.tensor[part]
            if self.rescale and before is not None and before[i] != mean.lr[i]:
                # Momentum gathered at lr = 0 is none at all; dividing by it would make NaN.
                ratio = mean.lr[i] / before[i] if before[i] else 0.0
                state.outer.state[z]["momentum_buffer"].mul_(ratio)
        state.outer.step()
        # Views of the buffer, in which the next payload will be.
        for z in anchors:
            z.grad = None
        if self.rescale:
            state.lr = list(mean.lr)


@final
@dataclass(frozen=True)
class OuterOptimizer(OuterStep):
    """z <- step of any torch optimizer whose gradient is z - mean.

    It is tried once at construction, so that a wrong factory fails there and workers can compare what
    they make, not the functions that make it.

    Args:
        factory: list of anchor tensors -> the optimizer that moves them, for example
            `lambda anchors: torch.optim.Adam(anchors, lr=0.01)`. Called once per fragment.

    Raises:
        ValueError: it cannot be called so, or what it makes is not a torch optimizer over exactly these
            tensors that takes a dense gradient and no closure.
    """

    factory: OuterFactory = field(compare=False, repr=False)
    settings: str = field(init=False)

    def __post_init__(self) -> None:
        """Try the factory on one number, and note what it makes."""
        object.__setattr__(self, "settings", _tried(self.factory))

    def optimizer(self, anchors: list[torch.nn.Parameter]) -> torch.optim.Optimizer | None:
        """What the factory makes of them."""
        return self.factory(anchors)

    def step(self, fragment: Fragment, state: AnchorState, mean: Mean) -> None:
        """The mean is overwritten by the pseudo-gradient."""
        assert state.outer is not None
        pseudo_gradient = mean.flat.tensor[: fragment.numel]
        torch.sub(state.anchor.tensor, pseudo_gradient, out=pseudo_gradient)
        anchors = state.outer.param_groups[0]["params"]
        for z, (_, part) in zip(anchors, fragment.segments, strict=True):
            z.grad = pseudo_gradient[part]
        state.outer.step()
        for z in anchors:
            z.grad = None


def _tried(factory: OuterFactory) -> str:
    """Kind and settings of what the factory makes: what must be equal on all workers."""
    anchor = torch.nn.Parameter(torch.zeros(1))
    if not callable(factory):
        raise ValueError(
            f"outer={factory!r}: allowed is a function, list of tensors -> torch optimizer"
        )
    made = factory([anchor])
    if not isinstance(made, torch.optim.Optimizer) or [
        g["params"][0] is anchor and len(g["params"]) == 1 for g in made.param_groups
    ] != [True]:
        raise ValueError(
            f"outer: makes {made!r}; allowed is a torch optimizer with one param group, of the "
            "tensors it is given"
        )
    anchor.grad = torch.zeros(1)
    try:
        made.step()
    except (TypeError, RuntimeError) as error:
        # LBFGS wants a closure, SparseAdam sparse gradients: neither is to be had from a mean.
        raise ValueError(
            f"outer: {type(made).__name__} cannot step on a dense mean ({error}); allowed is a torch "
            "optimizer that needs no closure"
        ) from error
    defaults = ", ".join(f"{name}={value}" for name, value in sorted(made.defaults.items()))
    return f"{type(made).__name__}({defaults})"


@final
@dataclass(frozen=True)
class Pull(Rule):
    """The anchor takes an outer step to the mean, then pulls the worker: x <- (1 - alpha) x + alpha z.

    Args:
        outer: moves the anchor.
        alpha: weight of the anchor in the pull, in [0, 1]; 1 adopts the anchor and drops the local value.
    """

    outer: OuterStep
    alpha: float

    @property
    def follows_lr(self) -> bool:
        """As the outer step does."""
        return self.outer.follows_lr

    def start(self, fragment: Fragment) -> State:
        """The start as anchor, momentum 0."""
        return Anchored(*self.outer.start(fragment))

    def merge(self, fragment: Fragment, state: State, mean: Mean) -> None:
        """z <- outer step; x <- (1 - alpha) x + alpha z."""
        assert isinstance(state, Anchored)
        self.outer.step(fragment, state, mean)
        if self.alpha == 1:
            fragment.write(state.anchor)
        else:
            fragment.pull(state.anchor, self.alpha)

    def shared(self, state: State) -> Mapping[str, Any]:
        """Anchor, outer optimizer and its learning rates: all of the state."""
        return shared_fields(state)


@final
@dataclass(frozen=True)
class Carry(Rule):
    """Adopt the anchor and keep the local steps made since the launch: x <- z + (x - sent).

    At delay 0 there are none, and this is `Pull` with alpha = 1.

    Args:
        outer: moves the anchor.
    """

    outer: OuterStep

    @property
    def follows_lr(self) -> bool:
        """As the outer step does."""
        return self.outer.follows_lr

    def start(self, fragment: Fragment) -> State:
        """The start as anchor, and as what was sent."""
        anchor, outer = self.outer.start(fragment)
        return Carried(anchor, outer, base=start_base(anchor, fragment))

    def sent(self, fragment: Fragment, state: State, sent: Flat) -> None:
        """Remember what was sent, or the anchor where that was not finite."""
        assert isinstance(state, Carried)
        base = state.base.tensor
        payload = sent.tensor[: fragment.numel]
        if fragment.device.type == "cpu":
            # A worker that was not finite has been put back to the anchor.
            base.copy_(payload)
        else:
            # Only the weight, 0 or 1, says so: the host does not know yet.
            torch.lerp(state.anchor.tensor, payload, sent.tensor[-1], out=base)

    def merge(self, fragment: Fragment, state: State, mean: Mean) -> None:
        """z <- outer step; x <- z + (x - base)."""
        assert isinstance(state, Carried)
        self.outer.step(fragment, state, mean)
        carry_over(fragment, state)

    def shared(self, state: State) -> Mapping[str, Any]:
        """All but the base."""
        return shared_fields(state)


def adopting(outer: OuterStep, *, delay: int | None, carry: bool) -> Rule:
    """The rule that adopts the anchor, fit for the delay.

    Raises:
        ValueError: a delay without `carry`, which would throw away the local steps made meanwhile.
    """
    if not checks.flag("carry", carry) and not checks.is_zero(delay):
        raise ValueError(
            f"delay={delay} without carry: adopting a late anchor throws away the local steps made "
            "meanwhile; use delay=0, or carry=True, which keeps them, or OverlapLocalSGD, which pulls "
            "instead"
        )
    return Pull(outer, 1.0) if checks.is_zero(delay) else Carry(outer)
