"""What an inner optimizer remembers: what of it is disposable, and what is a copy of the parameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

# An attribute, as for modules: a class may have it too.
_DECLARED = "_distoptim_copies"
# State this near to the parameters, of their norm, is taken for a copy that nobody has declared.
_NEAR = 0.1


def copies(optimizer: torch.optim.Optimizer, names: str | Iterable[str]) -> None:
    """Declare state that holds the parameters in another form: it is sent and merged as they are.

    For moving averages of the weights, the z of schedule-free optimizers, and master weights that are
    to be averaged unrounded. A merge is affine and the same for all elements: x <- sum of c_k v_k with
    sum of c_k = 1, where the v_k are values of x (own, sent, means, anchors). So what is an affine
    combination of tensors that are merged is merged by the same rule. Schedule-free optimizers step at
    y = (1 - beta) z + beta x, keep y in the parameters and z in the state: with "z" declared, x too
    follows the rule, and y, z and x go on belonging together. Exact but for a merge that is not affine:
    `CO2` where its bound clips, `DiLoCo` with an outer Adam and the like.

    What is not declared is the worker's own and disposable, as momentum is. Each name makes messages,
    and what an algorithm keeps, longer by the parameters.

    Args:
        optimizer: to be wrapped, not yet an averaging one.
        names: keys of the state of each parameter, whose tensors have its shape and begin at its value;
            () says that there are none.

    Raises:
        ValueError: it is no plain torch optimizer, or a name is none. When state is there: there is
            no state of that name, or one of another shape (sharded) or of a dtype that is not averaged
            as the parameters are.

    Source: schedule-free: Defazio et al. 2024 (arXiv 2405.15682), equations 3 to 5.
    """
    if not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "engine"):
        raise ValueError(
            f"copies({type(optimizer).__name__}): allowed is the inner optimizer, before it is wrapped"
        )
    chosen = (names,) if isinstance(names, str) else names
    if not isinstance(chosen, Iterable) or not all(isinstance(n, str) and n for n in chosen):
        raise ValueError(f"names={names!r}: allowed are names of state, as 'z'")
    setattr(optimizer, _DECLARED, tuple(dict.fromkeys(chosen)))


@final
class StateCopies:
    """The declared copies of an optimizer's parameters, looked up anew, since loading replaces them.

    Args:
        optimizer: the inner one.

    Attributes:
        names: that were declared.

    Raises:
        ValueError: as `check`, if there is state already.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        said: tuple[str, ...] | None = getattr(optimizer, _DECLARED, None)
        self.names = said or ()
        # torch's own have momentum and the like.
        self._known = said is not None or type(optimizer).__module__.startswith("torch.optim.")
        if states := [(p, state) for p, state in optimizer.state.items() if state]:
            self.check(states)

    def of(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The copies of these parameters, name after name.

        Where one is not there yet, the parameter counts, at whose value it begins: a tensor that nobody
        holds, so that nothing is written to either.
        """
        state = self._optimizer.state
        return [
            found if (found := state.get(p, {}).get(name)) is not None else p.detach().clone()
            for name in self.names
            for p in params
        ]

    def held(self, params: Sequence[Tensor]) -> int:
        """How many of them are there."""
        state = self._optimizer.state
        return sum(name in state.get(p, {}) for name in self.names for p in params)

    def check(self, states: Sequence[tuple[Tensor, Mapping[str, object]]]) -> None:
        """Whether what was declared is there, and can be merged.

        Args:
            states: of the parameters that have been stepped.

        Raises:
            ValueError: it is not.
        """
        for name in self.names:
            there = [(p, state[name]) for p, state in states if name in state]
            if not there:
                known = ", ".join(dict.fromkeys(key for _, state in states for key in state))
                raise ValueError(
                    f"copies {name!r}: {type(self._optimizer).__name__} has no such state; allowed are "
                    f"{known}"
                )
            for p, copy in there:
                _check_copy(name, p, copy)

    @torch.no_grad()
    def suspect(
        self, states: Sequence[tuple[Tensor, Mapping[str, object]]], names: Sequence[str]
    ) -> None:
        """Warn, once, of state that looks like a copy, of which nobody has said what it is.

        Args:
            states: of the parameters that have been stepped.
            names: of state that is not known to be a copy.
        """
        if self._known:
            return
        self._known = True
        for name in names:
            if all(_same_kind(p, state.get(name)) for p, state in states) and _near(name, states):
                warnings.warn(
                    f"{type(self._optimizer).__name__} keeps {name!r}, which looks like a copy of the "
                    "parameters, and will not be averaged: distoptim.copies(optimizer, "
                    f"{name!r}) has it merged with them, distoptim.copies(optimizer, ()) says that "
                    "there is none",
                    RuntimeWarning,
                    # The caller of step(); each no_grad is a frame too.
                    stacklevel=7,
                )


def _check_copy(name: str, p: Tensor, copy: object) -> None:
    if not isinstance(copy, Tensor) or copy.shape != p.shape:
        found = list(copy.shape) if isinstance(copy, Tensor) else type(copy).__name__
        raise ValueError(
            f"copies {name!r}: {found} beside a parameter of shape {list(p.shape)}; allowed are whole "
            "copies, not state that is sharded over ranks"
        )
    if copy.is_complex() != p.is_complex() or not (p.is_complex() or copy.is_floating_point()):
        raise ValueError(f"copies {name!r}: {copy.dtype}; allowed is the kind of {p.dtype}")
    if copy.dtype in (torch.float64, torch.complex128) and copy.dtype != p.dtype:
        raise ValueError(
            f"copies {name!r}: {copy.dtype} beside {p.dtype}, which is averaged in single precision; "
            "allowed is that"
        )


def _same_kind(p: Tensor, copy: object) -> bool:
    return isinstance(copy, Tensor) and copy.shape == p.shape and copy.is_floating_point()


def _near(name: str, states: Sequence[tuple[Tensor, Mapping[str, object]]]) -> bool:
    """Whether it is the parameters but for some local steps."""
    size = 0.0
    distance = 0.0
    for p, state in states:
        copy = state[name]
        assert isinstance(copy, Tensor)
        size += float(torch.linalg.vector_norm(p.detach())) ** 2
        distance += float(torch.linalg.vector_norm(copy.detach() - p.detach())) ** 2
    return math.isfinite(size) and size > 0 and distance <= _NEAR**2 * size
