"""Compute utilisation.

The share of its time that a worker computes, from layers and messages, without gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distoptim import checks
from distoptim.comm import Link

GRID = tuple(float(x) for x in np.logspace(-1, 3, 50))
# In rounds; the first ones have nothing in flight to wait for.
_WARM_UP = 4
_MEASURED = 4
_EPSILON = 1e-12


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A model as the clock sees it.

    Args:
        params: number of parameters, > 0, spread evenly over the layers.
        layers: >= 1.
        step_s: seconds of pure computation in a local step, > 0.
        fragments: into how many parts a streaming method cuts it, from 1 to `layers`; default 1.

    Raises:
        ValueError: a value outside its range.
    """

    params: float
    layers: int
    step_s: float
    fragments: int = 1

    def __post_init__(self) -> None:
        """Check the ranges."""
        checks.number("params", self.params, 0, checks.LARGEST, open_low=True)
        checks.integer("layers", self.layers, 1)
        checks.number("step_s", self.step_s, 0, checks.LARGEST, open_low=True)
        checks.integer("fragments", self.fragments, 1, self.layers)


@dataclass(frozen=True, kw_only=True)
class TimedMethod:
    """An algorithm as the clock sees it: what it sends, when, and what waits for it.

    Args:
        name: under which it is reported.
        payload_bytes: bytes sent per parameter and round, > 0; default 4, float32.
        tau: local steps in a round, >= 1; 1 is synchronous training.
        delay: local steps from launch to merge, in [0, tau]; 0 waits, tau hides a whole round.
        fragments: parts sent apart, part p of P shifted by floor(p tau / P) local steps; default 1;
            None is as many as the model has.
        layerwise: whether a layer is sent as soon as its own backward pass has ended, and only its
            own forward pass waits for it. Default False: a part is sent after a local step, and the
            next one that needs it waits before it begins, as in this library's optimizers.
        bucket_bytes: of a method that sends gradients in every step: layers are sent together from so
            many bytes on, as soon as the backward pass of the last of them has ended, and the next step
            waits for all, as in DistributedDataParallel. None: not so.

    Raises:
        ValueError: a value outside its range.
    """

    name: str
    payload_bytes: float = 4.0
    tau: int = 1
    delay: int = 0
    fragments: int | None = 1
    layerwise: bool = False
    bucket_bytes: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.bucket_bytes is not None:
            checks.number("bucket_bytes", self.bucket_bytes, 0, checks.LARGEST, open_low=True)
            checks.integer("tau of a method with buckets", self.tau, 1, 1)
        checks.number("payload_bytes", self.payload_bytes, 0, checks.LARGEST, open_low=True)
        checks.integer("tau", self.tau, 1)
        checks.integer("delay", self.delay, 0, self.tau)
        if self.fragments is not None:
            checks.integer("fragments", self.fragments, 1)
        checks.flag("layerwise", self.layerwise)


@dataclass(frozen=True)
class _Message:
    """One all-reduce: times count units of computation since the round began."""

    launch: int
    need: int
    layers: int


def utilisation(
    model: ModelShape,
    method: TimedMethod,
    bandwidth_gbit_s: float,
    *,
    latency_s: float = 0.0,
    workers: int = 2,
) -> float:
    """The share of its time that a worker computes, in (0, 1]; see `utilisations`.

    Args:
        model: what is trained.
        method: how.
        bandwidth_gbit_s: each worker's rate in Gbit/s, > 0.
        latency_s: seconds one message takes, >= 0.
        workers: >= 1.

    Raises:
        ValueError: a value outside its range.
    """
    return float(
        utilisations(model, method, [bandwidth_gbit_s], latency_s=latency_s, workers=workers)[0]
    )


def utilisations(
    model: ModelShape,
    method: TimedMethod,
    bandwidths_gbit_s: Iterable[float],
    *,
    latency_s: float = 0.0,
    workers: int = 2,
) -> NDArray[np.float64]:
    """The share of its time that a worker computes, computing / (computing + waiting), for each
    bandwidth.

    The model, and why it is so:
    - Per layer one unit of time for the forward pass, one for the gradient of its input, one for
      that of its weights: three products of equal size. The first layer needs no gradient of its
      input, so a local step has 3 layers - 1 units, and forward to backward is about 1 to 2.
    - Computation is one sequential resource and so is the network: collectives run one after the
      other in the order of their launch, each 2 (n-1) latency + 2 (n-1)/n bytes / rate, a ring; for
      2 workers the factor is 1. A layerwise method so pays the latency once a layer, one with
      buckets once a bucket.
    - Fragment p of P holds the layers p, p + P, ... (strided).
    - A wait shifts all that is computed later. Measured once the pattern repeats, over whole
      rounds; that the link is never used for more than all the time is a bound of its own, which
      binds at once where a backlog would take many rounds to build up.
    Left out: memory and links inside a worker, the time of the optimizer and of the merge,
        stragglers.

    Args:
        model: what is trained.
        method: how.
        bandwidths_gbit_s: each worker's rate in Gbit/s, > 0.
        latency_s: seconds one message takes, >= 0.
        workers: >= 1.

    Raises:
        ValueError: a value outside its range.

    Source: the simulation of Douillard et al. 2025 (arXiv 2501.18512), section 3.1: per step 4
    layers - 1 nodes, of which `layers` are reductions.
    """
    rates = np.array(
        [
            checks.number("bandwidth_gbit_s", x, 0, checks.LARGEST, open_low=True)
            for x in bandwidths_gbit_s
        ]
    )
    messages = _messages(model, method)
    unit_s = model.step_s / (3 * model.layers - 1)
    round_units = method.tau * (3 * model.layers - 1)
    round_s = method.tau * model.step_s
    seconds = {
        n: _all_reduce_s(
            n / model.layers * model.params * method.payload_bytes, rates, latency_s, workers
        )
        for n in {m.layers for m in messages}
    }

    # Two times: `at` counts computation alone; on the clock it is `at + waited`.
    waited = np.zeros_like(rates)
    free = np.zeros_like(rates)
    arrival: dict[tuple[int, int], NDArray[np.float64]] = {}
    marks: list[NDArray[np.float64]] = []
    for units, is_need, which in _events(messages, round_units):
        while len(marks) < 2 and units >= (_WARM_UP + len(marks) * _MEASURED) * round_units:
            marks.append(waited)
        at = units * unit_s
        if is_need:
            waited = np.maximum(waited, arrival.pop(which) - at)
        else:
            free = np.maximum(free, at + waited) + seconds[messages[which[1]].layers]
            arrival[which] = free
    busy = sum(seconds[m.layers] for m in messages)
    return round_s / np.maximum(round_s + (marks[1] - marks[0]) / _MEASURED, busy)


def first_reaching(target: float, grid: Sequence[float], values: NDArray[np.float64]) -> float:
    """The first point of the grid whose value reaches the target, in (0, 1]; infinity if none does.

    Raises:
        ValueError: the target is outside its range.
    """
    checks.number("target", target, 0, 1, open_low=True)
    good = np.flatnonzero(values >= target - _EPSILON)
    return float(grid[good[0]]) if good.size else math.inf


def _all_reduce_s(
    nbytes: float, rates: NDArray[np.float64], latency_s: float, workers: int
) -> NDArray[np.float64]:
    checks.number("latency_s", latency_s, 0, checks.LARGEST)
    checks.integer("workers", workers, 1)
    start = Link(latency_s, math.inf).all_reduce_s(0, workers)
    return start + Link(0.0, 1.0).all_reduce_s(nbytes, workers) / rates


def _messages(model: ModelShape, method: TimedMethod) -> list[_Message]:
    """What is sent in one round, in the order in which it is launched within a step."""
    if method.bucket_bytes is not None:
        return _buckets(model, method.bucket_bytes, method.payload_bytes)
    parts = model.fragments if method.fragments is None else method.fragments
    checks.integer(f"fragments of {method.name}", parts, 1, model.layers)
    count = model.layers
    step = 3 * count - 1
    messages = []
    for part in range(parts):
        begin = part * method.tau // parts * step
        need = begin + (1 + method.delay) * step
        layers = range(part, count, parts)
        if method.layerwise:
            messages += [
                _Message(begin + _backward_ends(count, layer), need + layer, 1)
                for layer in reversed(layers)
            ]
        else:
            messages.append(_Message(begin + step, need, len(layers)))
    return messages


def _buckets(model: ModelShape, bucket_bytes: float, payload_bytes: float) -> list[_Message]:
    """Of one step, the last layers first."""
    count = model.layers
    size = max(1, math.ceil(bucket_bytes / (model.params / count * payload_bytes)))
    return [
        _Message(_backward_ends(count, max(0, last - size)), 3 * count - 1, min(size, last))
        for last in range(count, 0, -size)
    ]


def _backward_ends(count: int, layer: int) -> int:
    """Units until the gradients of a layer's weights are there.

    The forward pass takes `count` units, then the backward pass two a layer, the last layer first.
    """
    return min(count + 2 * (count - layer), 3 * count - 1)


def _events(messages: list[_Message], units: int) -> list[tuple[int, bool, tuple[int, int]]]:
    """All launches and needs of as many rounds as it takes, in order.

    At one time launches come first.
    """
    return sorted(
        (turn * units + at, is_need, (turn, i))
        for turn in range(_WARM_UP + _MEASURED + 1)
        for i, m in enumerate(messages)
        for is_need, at in ((False, m.launch), (True, m.need))
    )
