"""What trainers must equal: local updates written down in plain torch, with torch.distributed alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TAU = 3


def averaged(params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    out = []
    for p in params:
        mean = p.detach().clone()
        dist.all_reduce(mean)
        out.append(mean / dist.get_world_size())
    return out


class LocalSGD:
    """x <- mean of x, every TAU local steps."""

    def __init__(self, params: Sequence[torch.nn.Parameter]) -> None:
        self.params = list(params)
        self.steps = 0

    def average(self) -> None:
        self.steps += 1
        if self.steps % TAU == 0:
            self.merge()

    @torch.no_grad()
    def merge(self) -> None:
        for p, mean in zip(self.params, averaged(self.params), strict=True):
            p.copy_(mean)


class OverlapLocalSGD(LocalSGD):
    """z <- the mean of what was sent a round ago; x <- 0.4 x + 0.6 z; send x."""

    def __init__(self, params: Sequence[torch.nn.Parameter]) -> None:
        super().__init__(params)
        self.in_flight = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def merge(self) -> None:
        for p, z in zip(self.params, self.in_flight, strict=True):
            p.lerp_(z, 0.6)
        self.in_flight = averaged(self.params)


BY_HAND: dict[str, Callable[..., LocalSGD]] = {"local": LocalSGD, "overlap": OverlapLocalSGD}


def ours(name: str, inner: torch.optim.Optimizer, **options: Any) -> Any:
    import distoptim

    if name == "local":
        return distoptim.LocalSGD(inner, tau=TAU, **options)
    return distoptim.OverlapLocalSGD(inner, tau=TAU, alpha=0.6, outer_momentum=0.0, **options)


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def whole(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([t.detach().flatten().double() for t in model.state_dict().values()])


def equal_everywhere(x: torch.Tensor) -> None:
    """All workers call it, each with its own."""
    first = x.clone()
    dist.broadcast(first, 0)
    assert torch.equal(x, first)


def of_the_page(name: str) -> str:
    """The code of docs/NAME.md as it is after its diff."""
    page = (Path(__file__).parents[2] / "docs" / f"{name}.md").read_text()
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return "\n".join(line[1:] for line in diff.splitlines() if line[:1] != "-")
