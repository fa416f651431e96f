"""The parts of torch.optim.Optimizer that stay the inner optimizer's."""

from __future__ import annotations

from typing import Any

import torch


class Face(torch.optim.Optimizer):
    """An optimizer around another, `inner`, whose param groups and state are also its own."""

    inner: torch.optim.Optimizer

    def _face(self) -> None:
        """Give torch's base class its hooks; groups and state stay the inner optimizer's."""
        super().__init__([{"params": []}], self.inner.defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the anchors were cut at construction.

        Raises:
            ValueError: always, once the optimizer is made.
        """
        params = param_group["params"]
        if not isinstance(params, list) or params:
            raise ValueError(
                "the parameters of a distoptim optimizer are fixed at construction; make a new one"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients."""
        self.inner.zero_grad(set_to_none)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's own, so that schedulers work in any order."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, value: object) -> None:
        """Torch's constructor sets them; they stay the inner optimizer's."""

    @property
    def state(self) -> Any:
        """The inner optimizer's own."""
        return self.inner.state

    @state.setter
    def state(self, value: object) -> None:
        """Torch's constructor sets it; it stays the inner optimizer's."""

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return bool(getattr(self.inner, "_step_supports_amp_scaling", False))
