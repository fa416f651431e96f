"""What an averaging optimizer holds, for tests: ours, and those of an algorithm of your own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from distoptim.comm.compressed import CompressedMean
from distoptim.engine.fragment_sync import FragmentSync
from distoptim.fragments import Flat
from distoptim.optimizer import AveragingOptimizer
from distoptim.rule import Rule


@final
@dataclass(frozen=True)
class FragmentView:
    """What there is of one fragment: numbers of now, tensors that change with the optimizer.

    Attributes:
        params: the parameters that travel together.
        numel: how many elements they have.
        offset: local steps by which its rounds are shifted, in [0, tau).
        launched: local step of the last launch; 0 or less before the first.
        next_launch: local step of the next launch.
        due: local step at which the mean in flight is merged; None where none is.
        merges: how many means were merged.
        samples: of this worker when it launched last (`average(samples=)`).
        buffer: [numel + n] what was sent, then its mean; behind it what the period measures, the
            identity of the message, and the weight as the last element.
        shared: of the rule's state, what it says is equal on all workers, by name.
        own: the rest of it. A value is a tensor, a torch optimizer, or plain data.
        coded: how its means travel through a codec; None without one.
    """

    params: Sequence[Tensor]
    numel: int
    offset: int
    launched: int
    next_launch: int
    due: int | None
    merges: int
    samples: float
    buffer: Tensor
    shared: Mapping[str, Any]
    own: Mapping[str, Any]
    coded: CompressedMean | None

    @property
    def in_flight(self) -> bool:
        """Whether a mean is launched and not merged."""
        return self.due is not None

    @property
    def anchor(self) -> Tensor | None:
        """[numel], the anchor; None in an algorithm without one."""
        anchor = self.shared.get("anchor")
        return anchor if isinstance(anchor, Tensor) else None

    @property
    def outer(self) -> torch.optim.Optimizer | None:
        """The optimizer of the anchor; None where there is none, or its step needs no memory."""
        outer = self.shared.get("outer")
        return outer if isinstance(outer, torch.optim.Optimizer) else None


@final
@dataclass(frozen=True)
class Inspection:
    """What there is of an optimizer at one local step.

    Attributes:
        step: local steps so far.
        tau: local steps in a round now.
        delay: local steps from launch to merge now.
        rule: what is sent and how a mean is merged.
        fragments: in the order in which they are launched.
        in_flight: indices of those with a mean in flight, the oldest first.
    """

    step: int
    tau: int
    delay: int
    rule: Rule
    fragments: Sequence[FragmentView]
    in_flight: Sequence[int]

    def anchors(self) -> Tensor | None:
        """A copy of the anchors of all fragments in one tensor; None in an algorithm without one."""
        found = [view.anchor for view in self.fragments if view.anchor is not None]
        return torch.cat(found) if found else None

    def shared(self) -> list[Tensor]:
        """Copies of all tensors and numbers that the rule says are equal on all workers."""
        return [x for view in self.fragments for x in copied(view.shared)]

    def own(self) -> list[Tensor]:
        """Copies of all tensors and numbers of the rule's states that are this worker's."""
        return [x for view in self.fragments for x in copied(view.own)]


def inspect(optimizer: AveragingOptimizer) -> Inspection:
    """Look at an optimizer without changing it.

    What a run has measured is in `optimizer.stats()`.
    """
    engine = optimizer.engine
    pending = [sync for sync in engine.syncs if sync.pending is not None]
    return Inspection(
        step=engine.step,
        tau=engine.clock.tau,
        delay=engine.clock.delay,
        rule=engine.rule,
        fragments=[_view(sync, engine.rule, engine.clock.tau) for sync in engine.syncs],
        in_flight=[sync.index for sync in sorted(pending, key=lambda sync: sync.launched)],
    )


def _view(sync: FragmentSync, rule: Rule, tau: int) -> FragmentView:
    shared = rule.shared(sync.state)
    return FragmentView(
        params=sync.fragment.params,
        numel=sync.fragment.numel,
        offset=sync.fragment.offset_at(tau),
        launched=sync.launched,
        next_launch=sync.next_launch,
        due=None if sync.pending is None else sync.pending.due,
        merges=sync.merges,
        samples=sync.samples,
        buffer=sync.buffer.tensor,
        shared={name: _shown(value) for name, value in shared.items()},
        own={name: _shown(v) for name, v in vars(sync.state).items() if name not in shared},
        coded=sync.compressed,
    )


def _shown(value: Any) -> Any:
    return value.tensor if isinstance(value, Flat) else value


def copied(state: Mapping[str, Any]) -> list[Tensor]:
    """Copies of all tensors and numbers in a state, flat and in a fixed order."""
    return [x for name in sorted(state) for x in _tensors(state[name])]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.detach().reshape(-1).clone()
    elif isinstance(value, int | float):
        yield torch.tensor([value], dtype=torch.float64)
    elif isinstance(value, torch.optim.Optimizer):
        yield from _tensors(value.state_dict()["state"])
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _tensors(value[key])
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
