"""The outer optimizer as a factory.

Any torch optimizer, stepped on the anchor with the pseudo-gradient as .grad.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Factory = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


class Outer:
    """A factory that has been tried once, so that a wrong one fails at construction and workers can
    compare.

    Args:
        factory: list of anchor tensors -> the optimizer that moves them,
            for example `lambda anchors: torch.optim.Adam(anchors, lr=0.01)`. Called once per
            fragment.

    Raises:
        ValueError: it cannot be called so, or what it makes is not a torch optimizer over exactly
            these tensors.
    """

    def __init__(self, factory: Factory) -> None:
        self.factory = factory
        self._settings = f"{type(made := self._try()).__name__}({_plain(made.defaults)})"

    def __call__(self, anchors: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of one fragment's anchors."""
        return self.factory(anchors)

    def __repr__(self) -> str:
        """Kind and settings: what must be equal on all workers."""
        return self._settings

    def __eq__(self, other: object) -> bool:
        """Equal if the settings are.

        Workers compare what they make, not the functions that make it.
        """
        return isinstance(other, Outer) and repr(self) == repr(other)

    def __hash__(self) -> int:
        """Of the settings."""
        return hash(self._settings)

    def _try(self) -> torch.optim.Optimizer:
        anchors = [torch.nn.Parameter(torch.zeros(1))]
        if not callable(self.factory):
            raise ValueError(
                f"outer={self.factory!r}: allowed is a function, list of tensors -> torch optimizer"
            )
        made = self.factory(anchors)
        if not isinstance(made, torch.optim.Optimizer) or [
            g["params"][0] is anchors[0] and len(g["params"]) == 1 for g in made.param_groups
        ] != [True]:
            raise ValueError(
                f"outer: makes {made!r}; allowed is a torch optimizer with one param group, of the "
                "tensors it is given"
            )
        return made


def _plain(defaults: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(defaults.items()))
