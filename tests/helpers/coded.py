"""A quadratic large enough for codes in two stages, and algorithms to try codecs with."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import distoptim
from distoptim.testing.lockstep import Lockstep


def numbers(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


# 15 blocks of 256, the last one not full: enough for two stages of up to 7 workers, and of 8 with
# parts of two blocks.
START = [
    numbers(n, seed).view(shape)
    for seed, (n, shape) in enumerate([(3500, (70, 50)), (130, (130,)), (1, ())])
]
MINIMA = [
    [numbers(p.numel(), 10 * (rank + 1) + i).view(p.shape) for i, p in enumerate(START)]
    for rank in range(8)
]
ALGORITHMS: dict[str, Any] = {
    "local": partial(distoptim.LocalSGD, tau=3),
    "cocod": partial(distoptim.CoCoDSGD, tau=3),
    "overlap": partial(distoptim.OverlapLocalSGD, tau=3, fragments=2),
    "overlap1": partial(distoptim.OverlapLocalSGD, tau=3, delay=1),
    "easgd": partial(distoptim.EASGD, tau=3, alpha=0.2),
    "diloco": partial(distoptim.DiLoCo, tau=3),
    "eager": partial(distoptim.EagerDiLoCo, tau=3),
    "co2": partial(distoptim.CO2, tau=3),
    "slowmo": partial(distoptim.SlowMo, tau=3),
}


def gradient(rank: int, params: list[Tensor]) -> list[Tensor]:
    """Of a quadratic whose minimum is another one on every worker."""
    return [
        (p - c) * (1 + 0.1 * i) for i, (p, c) in enumerate(zip(params, MINIMA[rank], strict=True))
    ]


def cluster(make: Any, size: int = 4, **options: Any) -> Lockstep:
    return Lockstep(partial(make, lr=0.05, momentum=0.5, **options), [START] * size)
