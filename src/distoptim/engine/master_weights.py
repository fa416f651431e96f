"""Copies of half-precision parameters that the inner optimizer steps on (master weights): they follow x.

Left alone, they would undo every merge at the next local step, which writes them over x. Those that were
declared (`distoptim.copies`) are merged themselves instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor

from distoptim.comm import mesh
from distoptim.inner_state import StateCopies


@final
class MasterWeights:
    """The state of an inner optimizer that is its parameters in higher precision.

    Found after a step by the values: of one name, in another dtype, and rounded equal to every parameter
    that has it. What else an optimizer keeps (momentum, averages) is its own and stays as it is.

    Args:
        optimizer: the inner one.
        declared: copies that are merged; looked at when there is state.

    Attributes:
        names: of its state; None where that is not known yet, since nothing but zeros was seen.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, declared: StateCopies) -> None:
        self._optimizer = optimizer
        self._declared = declared
        self._versions: list[int] = []
        self.names: list[str] | None = None

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """A block that leaves x as it found it."""
        current = self._versions == self._now() if self.names else False
        try:
            yield
        finally:
            if current:
                self._versions = self._now()

    @torch.no_grad()
    def follow(self) -> None:
        """copy <- x, if x has been written since the last step: merged, sent on, or loaded."""
        if self.names and self._versions != self._now():
            for p in self._params():
                for name in self.names:
                    copy = self._optimizer.state[p].get(name)
                    if copy is not None:
                        copy.copy_(p)

    @torch.no_grad()
    def look(self) -> None:
        """Look for copies until it is known whether there are any.

        Raises:
            ValueError: what was declared is not there, or cannot be merged.
        """
        if self.names is None:
            self.names = self._find()
        if self.names:
            self._versions = self._now()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Keep the precision of what was loaded from a state dict, and look for copies in it.

        torch rounds all state to the parameters' dtype when it loads.
        """
        keys = [key for group in state["param_groups"] for key in group["params"]]
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        for key, p in zip(keys, params, strict=False):
            for name, value in _items(state["state"].get(key)):
                mine = self._optimizer.state[p].get(name)
                if isinstance(mine, Tensor) and _may_copy(mine, value):
                    self._optimizer.state[p][name] = value.detach().to(mine.device, copy=True)
        self.names = None
        self.look()

    def _find(self) -> list[str] | None:
        params = self._params()
        if not params:
            # A step that was skipped, or an optimizer without memory.
            return None
        states = [self._optimizer.state[p] for p in params]
        both = list(zip(params, states, strict=True))
        self._declared.check(both)
        own = [name for name in states[0] if isinstance(name, str)]
        names = [name for name in own if name not in self._declared.names]
        pairs = {name: [(p, s[name]) for p, s in both if name in s] for name in names}
        alike = [name for name in names if all(_may_copy(p, copy) for p, copy in pairs[name])]
        found = [
            name
            for name in alike
            if all(torch.equal(copy.to(p.dtype), p) for p, copy in pairs[name])
        ]
        nonzero = any(bool(p.any()) for p in params)
        if nonzero:
            self._declared.suspect(both, [name for name in names if name not in found])
        return found if nonzero or not found else None

    def _params(self) -> list[Tensor]:
        return [
            p
            for group in self._optimizer.param_groups
            for p in group["params"]
            if self._optimizer.state.get(p)
        ]

    def _now(self) -> list[int]:
        # torch's own count of writes; there is no public way to read it.
        return [mesh.local(p)._version for p in self._params()]  # noqa: SLF001


def _items(state: object) -> list[tuple[Any, Any]]:
    return list(state.items()) if isinstance(state, Mapping) else []


def _may_copy(p: Tensor, copy: object) -> bool:
    """Whether it is of the same shape and higher precision."""
    return (
        isinstance(copy, Tensor)
        and copy.shape == p.shape
        and copy.is_floating_point()
        and copy.element_size() > p.element_size()
    )
