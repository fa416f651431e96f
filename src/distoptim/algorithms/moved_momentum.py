"""Momentum that is moved out of an inner optimizer: its steps are made without, something else has it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from distoptim import checks

# Exactly these classes: what derives from them may use their momentum in another way.
_SUM = {torch.optim.SGD: "momentum_buffer", torch.optim.RMSprop: "momentum_buffer"}
_AVERAGE = dict.fromkeys(
    (torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.RAdam), "exp_avg"
)
_KEPT = (
    "{kind} keeps its momentum, of which is not known how to move it into the workers' mean: say where it "
    "is by momentum_key= if it is a sum or an average of gradients; or make it 0 and give "
    "global_momentum= (docs/every-step.md)"
)


@final
@dataclass(frozen=True)
class MovedMomentum:
    """The momentum of an inner optimizer, group by group, read anew each time: schedulers write it.

    Two kinds are known. A sum, v <- mu v + g, x <- x - lr v (SGD; torch's dampening makes it
    mu v + (1 - dampening) g), moves x by lr (1 - dampening)/(1 - mu) a gradient in the long run. An
    average, m <- mu m + (1 - mu) g (Adam and its like), moves it by lr. With momentum mu elsewhere,
    which multiplies by 1/(1 - mu), a step without momentum keeps that learning rate if it is made at
    `factor` lr: 1 - dampening, or 1 - mu.

    Attributes:
        inner: the optimizer.
        key: of its param groups, from which momentum is moved: a number is a sum's, the first of a pair
            an average's; None: nothing is moved.
        given: the momentum of the mean where nothing is moved, in [0, 1).
        start: the momentum of each group at the start; workers compare it.
    """

    inner: torch.optim.Optimizer = field(compare=False, repr=False)
    key: str | None
    given: float
    start: list[float]

    def of(self, group: int) -> float:
        """Of a param group, now."""
        if self.key is None:
            return self.given
        return _first(self.inner.param_groups[group][self.key])

    def factor(self, group: int) -> float:
        """By what the learning rate of a param group is multiplied within the step, now."""
        if self.key is None:
            return 1.0
        settings = self.inner.param_groups[group]
        if isinstance(settings[self.key], tuple | list):
            return 1.0 - self.of(group)
        return 1.0 - float(settings.get("dampening", 0.0))

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """A block in which the param groups have no momentum, and the learning rate that goes with that."""
        key = self.key
        if key is None:
            yield
            return
        groups = self.inner.param_groups
        kept = [(group["lr"], group[key]) for group in groups]
        for i, group in enumerate(groups):
            if (factor := self.factor(i)) != 1:
                group["lr"] = group["lr"] * factor
            group[key] = _without(group[key])
        try:
            yield
        finally:
            for group, (lr, momentum) in zip(groups, kept, strict=True):
                group["lr"] = lr
                group[key] = momentum

    def check_state(self, states: Mapping[Any, Mapping[str, Any]]) -> None:
        """Whether there is momentum from before, which would be lost.

        Args:
            states: the inner optimizer's, by parameter.

        Raises:
            ValueError: there is.
        """
        name = {**_SUM, **_AVERAGE}.get(type(self.inner))
        if self.key is None or name is None:
            return
        for state in states.values():
            held = state.get(name)
            if isinstance(held, Tensor) and bool(held.any()):
                raise ValueError(
                    f"{type(self.inner).__name__} has made steps: its {name!r} holds momentum, which "
                    "cannot be moved into the workers' mean; allowed is a new optimizer, or its state "
                    f"with {name!r} of every parameter taken out or zeroed, which begins without momentum"
                )


def moved_momentum(
    inner: torch.optim.Optimizer, *, key: str | None, given: float | None
) -> MovedMomentum:
    """What there is to move, or the momentum that was given; one warning where it is not known.

    Args:
        inner: the optimizer.
        key: of its param groups, for optimizers that are not known here.
        given: the mean's momentum, for those that have none.

    Raises:
        ValueError: there is no such key, a momentum outside [0, 1), momentum from steps before, or two
            momenta.
    """
    found = key if key is not None else _known_key(inner)
    if found is None:
        if given is None and _may_have_momentum(inner):
            warnings.warn(_KEPT.format(kind=type(inner).__name__), RuntimeWarning, stacklevel=4)
        given = given or 0.0
        return MovedMomentum(inner, None, given, [given] * len(inner.param_groups))
    start = [_checked(i, group, found) for i, group in enumerate(inner.param_groups)]
    if given is not None:
        if any(start):
            raise ValueError(
                f"global_momentum={given} beside {found}={max(start)} of {type(inner).__name__}, which "
                "is moved into the mean: two momenta of one thing; give one"
            )
        return MovedMomentum(inner, None, given, [given] * len(start))
    momentum = MovedMomentum(inner, found, 0.0, start)
    momentum.check_state(inner.state)
    return momentum


def _known_key(inner: torch.optim.Optimizer) -> str | None:
    if type(inner) in _SUM:
        return "momentum"
    return "betas" if type(inner) in _AVERAGE else None


def _may_have_momentum(inner: torch.optim.Optimizer) -> bool:
    """Whether an optimizer that is not known has hyperparameters that are called so."""
    names = ("momentum", "betas", "beta1", "beta")
    return any(group.get(name) for group in inner.param_groups for name in names)


def _checked(index: int, group: Mapping[str, Any], key: str) -> float:
    if key not in group:
        raise ValueError(
            f"momentum_key={key!r}: param group {index} has none; allowed are "
            f"{', '.join(name for name in group if name != 'params')}"
        )
    value = group[key]
    first = value[0] if isinstance(value, tuple | list) and value else value
    plain = first.item() if isinstance(first, Tensor) and first.numel() == 1 else first
    return checks.number(f"{key} of param group {index}", plain, 0, 1, open_high=True)


def _first(value: Any) -> float:
    return float(value[0] if isinstance(value, tuple | list) else value)


def _without(value: Any) -> Any:
    """The same with momentum 0."""
    if isinstance(value, tuple | list):
        return type(value)([0.0, *value[1:]])
    return 0.0
