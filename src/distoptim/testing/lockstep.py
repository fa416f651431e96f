"""Workers in lockstep in this process, whose gradients a test says itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from distoptim.comm import Communicator
from distoptim.optimizer import AveragingOptimizer, average_together
from distoptim.simulator import Fabric, VirtualCommunicator
from distoptim.testing.inspection import Inspection, inspect

Make = Callable[..., AveragingOptimizer]
Gradient = Callable[[int, list[Tensor]], Sequence[Tensor | None]]


@final
class Lockstep:
    """Optimizers over their own copies of the parameters; can be pickled and copied as a whole.

    Unlike `distoptim.simulator.Cluster`, it has neither models nor time, and a step is cut where a
    test wants to look.

    Args:
        make: called as make(parameters, communicator=...) -> optimizer; must pass the communicator on.
        params: rank -> its parameters. Parameters are taken as they are, other tensors copied.
        communicator: called as communicator(fabric, rank); a subclass watches or spoils what is sent.

    Attributes:
        params: rank -> its parameters.
        optimizers: rank -> its optimizer.
    """

    def __init__(
        self,
        make: Make,
        params: Sequence[Sequence[Tensor]],
        *,
        communicator: Callable[[Fabric, int], Communicator] = VirtualCommunicator,
    ) -> None:
        self.params = [[_parameter(p) for p in mine] for mine in params]
        fabric = Fabric(len(params))
        self.optimizers: list[Any] = [
            make(mine, communicator=communicator(fabric, rank))
            for rank, mine in enumerate(self.params)
        ]

    def step(self, gradient: Gradient, **average: Any) -> None:
        """One local step of every worker, then `average(**average)`.

        Args:
            gradient: called as gradient(rank, its parameters, detached) -> their gradients.
            average: see `average`.
        """
        self.local_step(gradient)
        self.average(**average)

    def local_step(self, gradient: Gradient) -> None:
        """One local step of every worker, which `average()` has still to count."""
        for rank, (optimizer, params) in enumerate(zip(self.optimizers, self.params, strict=True)):
            for p, g in zip(params, gradient(rank, [p.detach() for p in params]), strict=True):
                p.grad = g
            optimizer.step()
            optimizer.zero_grad()

    def average(
        self,
        *,
        losses: Sequence[Tensor | float] | None = None,
        samples: Sequence[float | None] | None = None,
        before_launch: Callable[[], object] | None = None,
    ) -> None:
        """`average()` of all.

        Args:
            losses: of this step, rank by rank.
            samples: of this step, rank by rank; a worker's are left away by None.
            before_launch: called between merges and launches.
        """
        average_together(
            self.optimizers, losses=losses, samples=samples, before_launch=before_launch
        )

    def run(self, steps: int, gradient: Gradient) -> Tensor:
        """[steps, workers, dimension]: x after each of the next steps."""
        out = []
        for _ in range(steps):
            self.step(gradient)
            out.append(self.x())
        return torch.stack(out)

    def x(self) -> Tensor:
        """[workers, dimension]: the parameters now."""
        return torch.stack([flat(mine) for mine in self.params])

    def views(self) -> list[Inspection]:
        """Rank -> what its optimizer holds."""
        return [inspect(optimizer) for optimizer in self.optimizers]

    def has_anchor(self) -> bool:
        """Whether the algorithm has an anchor."""
        return inspect(self.optimizers[0]).anchors() is not None

    def anchors(self) -> list[Tensor]:
        """Rank -> a copy of the anchors of all its fragments."""
        found = [view.anchors() for view in self.views()]
        return [anchor for anchor in found if anchor is not None]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """A copy of all of them in one vector."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _parameter(p: Tensor) -> torch.nn.Parameter:
    return p if isinstance(p, torch.nn.Parameter) else torch.nn.Parameter(p.clone())
