"""What an algorithm has to say.

What a worker sends, and how the finished mean meets its parameters.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distoptim.fragments import Flat, Fragment


@dataclass
class Mean:
    """What a merge gets.

    Attributes:
        flat: the mean of the payloads; the rule may overwrite it.
        workers: how many workers' payloads are in it.
        lr: at the launch, the inner learning rate of each segment of the fragment.
    """

    flat: Flat
    workers: float
    lr: Sequence[float]


@dataclass
class State:
    """A rule's memory for one fragment; everything in it is checkpointed. Subclasses add fields.

    A field is a `Flat`, a `torch.optim.Optimizer`, or plain data.
    """


class Rule(ABC):
    """What a worker sends, and how the finished mean meets the local parameters.

    Subclasses are frozen dataclasses: their fields are part of what all workers must agree on.
    """

    def facts(self) -> dict[str, object]:
        """The fields, those that are called as text.

        Functions cannot be sent, nor compared between processes.
        """
        return {
            name: repr(value) if callable(value) else value for name, value in vars(self).items()
        }

    def start(self, fragment: Fragment) -> State:
        """The state before the first step; all workers hold equal parameters then."""
        return State()

    def payload(self, fragment: Fragment, state: State, out: Flat) -> None:
        """Write what the worker sends: out <- x unless overridden."""
        fragment.read(out)

    def launched(self, fragment: Fragment, state: State, sent: Flat) -> None:  # noqa: B027  # optional, not abstract
        """What is to be done with the payload before it leaves; nothing unless overridden."""

    @abstractmethod
    def merge(self, fragment: Fragment, state: State, mean: Mean) -> None:
        """Combine the finished mean with the state and the local parameters."""

    def fallback(self, state: State) -> Flat | None:
        """Where a worker with parameters that are not finite goes back to.

        None if the merge overwrites them.
        """
        return None


def save(state: State) -> dict[str, Any]:
    """A state as plain data and tensors (not copied)."""
    out: dict[str, Any] = {}
    for name, value in vars(state).items():
        if isinstance(value, Flat):
            value = value.tensor
        elif isinstance(value, torch.optim.Optimizer):
            value = value.state_dict()
        out[name] = value
    return out


def layout(saved: dict[str, Any]) -> dict[str, str]:
    """Of a saved state, the fields and whether they hold memory (a tensor, an optimizer's state) or plain data."""
    return {
        name: "memory" if isinstance(value, torch.Tensor | dict) else "data"
        for name, value in saved.items()
    }


def load(state: State, saved: dict[str, Any]) -> None:
    """Put saved values of the same layout into a state, tensors in place.

    Hyperparameters stay the state's own.
    """
    for name, value in vars(state).items():
        if isinstance(value, Flat):
            value.tensor.copy_(saved[name])
        elif isinstance(value, torch.optim.Optimizer):
            # A copy, since torch would keep the saved tensors themselves.
            value.load_state_dict(
                {
                    "state": copy.deepcopy(saved[name]["state"]),
                    "param_groups": value.state_dict()["param_groups"],
                }
            )
        else:
            setattr(state, name, saved[name])
