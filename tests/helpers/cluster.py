"""Virtual workers in one process, in lockstep.

The engine's two halves are called for all in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distoptim import AveragingOptimizer
from distoptim.optimizer import average_together
from distoptim.simulator import Fabric, VirtualCommunicator

Gradient = Callable[[int, list[Tensor]], list[Tensor]]


class Cluster:
    """`workers` optimizers over their own copies of the parameters; can be pickled and deep-copied
    as a whole.

    Args:
        make: called as make(parameters, communicator=...) -> optimizer.
        params: rank -> its parameters; tensors are copied into parameters.
    """

    def __init__(
        self, make: Callable[..., AveragingOptimizer], params: Sequence[Sequence[Tensor]]
    ) -> None:
        self.params = [
            [
                p if isinstance(p, torch.nn.Parameter) else torch.nn.Parameter(p.clone())
                for p in mine
            ]
            for mine in params
        ]
        fabric = Fabric(len(params))
        self.optimizers: list[Any] = [
            make(mine, communicator=VirtualCommunicator(fabric, rank))
            for rank, mine in enumerate(self.params)
        ]

    def step(self, gradient: Gradient, before_launch: Callable[[], object] = lambda: None) -> None:
        """One local step of every worker with gradient(rank, its parameters), then average()."""
        self.local_step(gradient)
        self.average(before_launch)

    def local_step(self, gradient: Gradient) -> None:
        for rank, (optimizer, params) in enumerate(zip(self.optimizers, self.params, strict=True)):
            for p, g in zip(params, gradient(rank, [p.detach() for p in params]), strict=True):
                p.grad = g
            optimizer.step()
            optimizer.zero_grad()

    def average(self, before_launch: Callable[[], object] = lambda: None) -> None:
        average_together(self.optimizers, before_launch=before_launch)

    def run(self, steps: int, gradient: Gradient) -> Tensor:
        """[steps, workers, dimension]: x after each of the next steps."""
        out = []
        for _ in range(steps):
            self.step(gradient)
            out.append(self.x())
        return torch.stack(out)

    def x(self) -> Tensor:
        """[workers, dimension]."""
        return torch.stack(
            [torch.cat([p.detach().reshape(-1) for p in mine]) for mine in self.params]
        )

    def anchors(self) -> list[Tensor]:
        """Rank -> the anchors of all its fragments."""
        return [
            torch.cat([sync.state.anchor.tensor for sync in o.engine.syncs])
            for o in self.optimizers
        ]

    def has_anchor(self) -> bool:
        return hasattr(self.optimizers[0].engine.syncs[0].state, "anchor")
