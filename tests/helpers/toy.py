"""A quadratic in three parameters, whose minimum is another one on every worker.

And all algorithms to try on it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from distoptim import ALGORITHMS, AveragingOptimizer
from distoptim.comm import SingleWorker

WORKERS, TAU = 4, 3
SHAPES = [(2, 3), (4,), ()]
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True}

_generator = torch.Generator().manual_seed(0)
_START = [torch.randn(shape, generator=_generator, dtype=torch.float64) for shape in SHAPES]
_MINIMA = [
    [torch.randn(shape, generator=_generator, dtype=torch.float64) for shape in SHAPES]
    for _ in range(8)
]

# Algorithms whose default is without one of their parts.
EXTRA: dict[str, tuple[str, dict[str, Any]]] = {
    "local-sgd-momentum": ("local-sgd", {"outer_momentum": 0.5}),
    "bmuf-nesterov": ("bmuf", {"nesterov_block": True, "block_lr": 0.9}),
    "overlap-plain": ("overlap-local-sgd", {"outer_momentum": 0.0}),
    "diloco-adam": ("diloco", {"outer": partial(torch.optim.Adam, lr=0.1)}),
    "diloco-delayed": ("eager-diloco", {"eager": False}),
}


def start(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [p.to(dtype, copy=True) for p in _START]


def gradient(rank: int, params: list[Tensor]) -> list[Tensor]:
    return [
        (p - c.to(p.dtype)) * (1 + 0.1 * i)
        for i, (p, c) in enumerate(zip(params, _MINIMA[rank], strict=True))
    ]


def zero(rank: int, params: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) for p in params]


def variants(
    tau: int = TAU, fragments: tuple[int, ...] = (1, 3)
) -> dict[str, Callable[..., AveragingOptimizer]]:
    """Every algorithm at delay 0, 1 and tau where it has one, in one message and in several.

    By name.
    """
    out = {}
    for name, (base, options) in {**{name: (name, {}) for name in ALGORITHMS}, **EXTRA}.items():
        algorithm = ALGORITHMS[base]
        delays: list[dict[str, Any]] = [{}]
        takes = inspect.signature(algorithm).parameters
        if "delay" in takes:
            delays = [
                {"delay": delay, **({"carry": True} if delay and "carry" in takes else {})}
                for delay in sorted({0, min(1, tau), tau})
            ]
        for delay in delays:
            for count in fragments:
                label = "-".join(
                    [
                        name,
                        *(f"delay{d}" for key, d in delay.items() if key == "delay"),
                        f"fragments{count}",
                    ]
                )
                out[label] = partial(
                    algorithm, tau=tau, fragments=count, **{**OPTIONS, **options, **delay}
                )
    return out


def spread() -> dict[str, Callable[..., AveragingOptimizer]]:
    """Half of `variants`: every algorithm at every delay, in one message and in several by turns.

    So every algorithm is met with every delay and with both, and every delay with both.
    """
    every = variants()
    return {
        labels[i]: every[labels[i]]
        for turn, labels in enumerate(_by_algorithm(every))
        for i in range(len(labels))
        if i % 2 == (i // 2 + turn) % 2
    }


def once(turn: int) -> dict[str, Callable[..., AveragingOptimizer]]:
    """Of `spread` every algorithm once, at another delay in another turn."""
    return diagonal(spread(), turn)


def diagonal(makers: dict[str, Any], turn: int = 0) -> dict[str, Any]:
    """Of `makers` every algorithm once, each at another delay and split than its neighbours."""
    labels = [labels[(i + turn) % len(labels)] for i, labels in enumerate(_by_algorithm(makers))]
    return {label: makers[label] for label in labels}


def _by_algorithm(labels: Iterable[str]) -> list[list[str]]:
    return [
        list(group) for _, group in groupby(labels, key=lambda label: label.partition("-delay")[0])
    ]


def alone(make: Callable[..., AveragingOptimizer], params: Any, **options: Any) -> Any:
    """The optimizer of a worker that is alone on purpose, so that nothing warns."""
    return make(params, communicator=SingleWorker(), **options)
