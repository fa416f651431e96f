"""What an algorithm has to say: what a worker sends, and how the finished mean meets its parameters.

x is a worker's local parameters, z the anchor (one identical copy on every worker), mean the mean over
the workers of what was sent. A rule knows neither steps nor processes, so it runs unchanged with real
workers, with virtual ones, and alone.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from distoptim.comm.compressed import CompressedMean
from distoptim.fragments import Flat, Fragment


@dataclass
class Mean:
    """What a merge gets.

    Attributes:
        flat: the mean of the payloads; the rule may overwrite it.
        workers: how many workers' payloads are in it.
        lr: at the launch, the inner learning rate of each segment of the fragment.
        coded: how it came through a codec; None without one.
    """

    flat: Flat
    workers: float
    lr: Sequence[float]
    coded: CompressedMean | None = None


@dataclass
class State:
    """A rule's memory for one fragment; everything in it is checkpointed. Subclasses add fields.

    A field is a `Flat`, a `torch.optim.Optimizer`, or plain data: None, a bool, a number, text, or a list
    of these.
    """

    def unfit(self, fragment: Fragment, saved: Mapping[str, Any]) -> str | None:
        """Why saved values, each by itself of the right kind, cannot be loaded here; None: they can."""
        return None


@dataclass(frozen=True)
class Rule(ABC):
    """What a worker sends, and how the finished mean meets the local parameters.

    Subclasses are final frozen dataclasses: all workers must agree on their fields.
    """

    def facts(self) -> dict[str, object]:
        """The fields by name, as plain data; those of a part, such as an outer step, one by one."""
        out: dict[str, object] = {}
        for name, value in vars(self).items():
            if dataclasses.is_dataclass(value):
                parts = [f.name for f in dataclasses.fields(value) if f.compare]
                out.update({f"{name}_{part}": getattr(value, part) for part in parts})
            else:
                out[name] = value
        return out

    @property
    def follows_lr(self) -> bool:
        """Whether what is shared follows the inner learning rates (`Mean.lr`), which then must be equal on all
        workers at every launch; no unless overridden.
        """
        return False

    def start(self, fragment: Fragment) -> State:
        """The state before the first step; all workers hold equal parameters then."""
        return State()

    def payload(self, fragment: Fragment, state: State, out: Flat) -> None:
        """Write what the worker sends: out <- x unless overridden."""
        fragment.read(out)

    def sent(self, fragment: Fragment, state: State, sent: Flat) -> None:  # noqa: B027  # optional
        """Act once more on the payload, or on x, before it leaves; nothing unless overridden.

        The last element of `sent` is 1, or 0 where the payload was not finite and does not count.
        """

    @abstractmethod
    def merge(self, fragment: Fragment, state: State, mean: Mean) -> None:
        """Combine the finished mean with the state and the local parameters."""

    def abandoned(  # noqa: B027  # optional
        self, fragment: Fragment, state: State, sent: Flat | None
    ) -> None:
        """A launch whose mean never came: leave x and state as if there had been none.

        Nothing unless overridden: right for every rule that leaves x alone at the launch.

        Args:
            fragment: the parameters, with the local steps made since.
            state: as the launch left it.
            sent: the payload, and its weight (0 or 1) as last element; may be overwritten. None where it
                was not kept, since workers do not come and go: then nothing is launched any more.
        """

    def shared(self, state: State) -> Mapping[str, Any]:
        """The fields of the state that are equal on all workers, by name.

        An anchor is "anchor". Of "lr" alone nobody sees whether it is: workers may have learning rates of
        their own.
        """
        return {}

    def fallback(self, state: State) -> Flat | None:
        """Where a worker whose parameters are not finite goes back to: the anchor, if there is one.

        None if the merge overwrites the parameters anyway.
        """
        anchor = self.shared(state).get("anchor")
        return anchor if isinstance(anchor, Flat) else None


@dataclass
class Sent(State):
    """What was sent, which the mean replaces in the communication buffer."""

    sent: Flat


@final
@dataclass(frozen=True)
class Average(Rule):
    """x <- mean where no local step lies between launch and merge, else x <- x + (mean - sent).

    The second form keeps the steps made meanwhile, and the workers' mean on Local SGD's trajectory at
    any delay. The first is also what groups of neighbours and the synchronous phase of `PostLocal` do.

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

    def sent(self, fragment: Fragment, state: State, sent: Flat) -> None:
        """Keep a copy: the mean will stand in the buffer."""
        # Not by the state alone: in the synchronous phase of `PostLocal` it is another rule's.
        if self.carry and isinstance(state, Sent):
            state.sent.tensor.copy_(sent.tensor[: fragment.numel])

    def merge(self, fragment: Fragment, state: State, mean: Mean) -> None:
        """x <- mean, or x <- x + (mean - sent)."""
        if self.carry and isinstance(state, Sent):
            mean.flat.tensor[: fragment.numel].sub_(state.sent.tensor)
            fragment.add(mean.flat)
        else:
            fragment.write(mean.flat)

    def fallback(self, state: State) -> Flat | None:
        """What was sent last."""
        return state.sent if self.carry and isinstance(state, Sent) else None


def compared(rule: Rule, state: State) -> dict[str, Any]:
    """Of what is shared, what is bit-equal on all workers: not the learning rates, of which each may have its own."""
    return {name: value for name, value in rule.shared(state).items() if name != "lr"}


def save(state: State | Mapping[str, Any]) -> dict[str, Any]:
    """A state, or some of its fields by name, as plain data and tensors (not copied)."""
    out: dict[str, Any] = {}
    for name, value in (state if isinstance(state, Mapping) else vars(state)).items():
        if isinstance(value, Flat):
            out[name] = value.tensor
        elif isinstance(value, torch.optim.Optimizer):
            out[name] = value.state_dict()
        else:
            out[name] = value
    return out


def load(state: State, saved: Mapping[str, Any]) -> None:
    """Put saved values into a state of the same layout, tensors in place.

    Hyperparameters of an outer optimizer stay the state's own.
    """
    for name, value in vars(state).items():
        if name not in saved:
            continue
        if isinstance(value, Flat):
            value.tensor.copy_(saved[name])
        elif isinstance(value, torch.optim.Optimizer):
            # A copy, since torch would keep the saved tensors themselves.
            own = value.state_dict()
            value.load_state_dict({**own, "state": copy.deepcopy(saved[name]["state"])})
        else:
            setattr(state, name, saved[name])


def layout(saved: Mapping[str, Any]) -> dict[str, str]:
    """Of a saved state, the fields and whether they hold memory or plain data.

    Memory is a tensor or an optimizer's state.
    """
    return {
        name: "memory" if isinstance(value, torch.Tensor | dict) else "data"
        for name, value in saved.items()
    }
