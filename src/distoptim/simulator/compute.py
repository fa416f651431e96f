"""How long a local step takes: constant, different per worker, random, or as recorded."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from distoptim import checks

_BLOCK = 256


class Compute(Protocol):
    """A model of computation time."""

    def seconds(self, rank: int, step: int) -> float:
        """Seconds that worker `rank` computes for its local step `step` (from 0).

        Equal at each call.
        """


@dataclass(frozen=True)
class Constant:
    """Every step takes equally long, or equally long per worker.

    Args:
        step_s: seconds, > 0; or one value per worker, reused in turn where there are more workers.

    Raises:
        ValueError: a value outside its range.
    """

    step_s: float | Sequence[float]

    def __post_init__(self) -> None:
        """Check the range."""
        for value in self._each():
            checks.number("step_s", value, 0, math.inf, open_low=True, open_high=True)
        if not self._each():
            raise ValueError("step_s=[]: allowed is one number per worker")

    def seconds(self, rank: int, step: int) -> float:
        """The same at every step of a worker."""
        if isinstance(self.step_s, (int, float)):
            return self.step_s
        return self.step_s[rank % len(self.step_s)]

    def _each(self) -> Sequence[float]:
        return (self.step_s,) if isinstance(self.step_s, (int, float)) else self.step_s


@dataclass(frozen=True)
class ShiftedExponential:
    """T = shift + Exp(mean): a fixed amount of work and a memoryless delay.

    Args:
        shift_s: seconds no step can do without, >= 0.
        mean_s: mean of the random part, in seconds, > 0.
        seed: of the random streams, one per worker.

    Raises:
        ValueError: a value outside its range.
    """

    shift_s: float
    mean_s: float
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        checks.number("shift_s", self.shift_s, 0, math.inf, open_high=True)
        checks.number("mean_s", self.mean_s, 0, math.inf, open_low=True, open_high=True)
        checks.integer("seed", self.seed, 0)

    def seconds(self, rank: int, step: int) -> float:
        """Drawn for this worker and step; the same whenever it is asked."""
        return self.shift_s - self.mean_s * math.log1p(-_uniform(self.seed, rank, step))


@dataclass(frozen=True)
class Pareto:
    """P(T > t) = (scale / t)^shape for t >= scale: rare steps are very slow.

    Args:
        scale_s: seconds of the fastest step, > 0.
        shape: tail index, > 1 so that the mean scale shape / (shape - 1) is finite; small means
            heavy tail.
        seed: of the random streams, one per worker.

    Raises:
        ValueError: a value outside its range.
    """

    scale_s: float
    shape: float
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        checks.number("scale_s", self.scale_s, 0, math.inf, open_low=True, open_high=True)
        checks.number("shape", self.shape, 1, math.inf, open_low=True, open_high=True)
        checks.integer("seed", self.seed, 0)

    def seconds(self, rank: int, step: int) -> float:
        """Drawn for this worker and step; the same whenever it is asked."""
        return self.scale_s * float((1 - _uniform(self.seed, rank, step)) ** (-1 / self.shape))


@dataclass(frozen=True)
class Unequal:
    """Machines of unequal speed: what another model says, divided by the worker's speed.

    Args:
        compute: of speed 1.
        speeds: one per worker, > 0, reused in turn where there are more workers.

    Raises:
        ValueError: a value outside its range.
    """

    compute: Compute
    speeds: Sequence[float]

    def __post_init__(self) -> None:
        """Check the ranges."""
        for speed in self.speeds:
            checks.number("speed", speed, 0, math.inf, open_low=True, open_high=True)
        if not self.speeds:
            raise ValueError("speeds=[]: allowed is one number per worker")

    def seconds(self, rank: int, step: int) -> float:
        """The other model's, by the speed."""
        return self.compute.seconds(rank, step) / self.speeds[rank % len(self.speeds)]


class Trace:
    """Seconds as recorded: a CSV file with one line per local step and one column per worker.

    A run longer than the trace, or with more workers, starts again from its first line or column;
    one with fewer workers leaves the last columns out.

    Args:
        path: the file; empty lines and lines that begin with # are left out.

    Raises:
        ValueError: naming file and line: a hole, something that is no number > 0, no line at all.
    """

    def __init__(self, path: str | Path) -> None:
        self._steps: list[list[float]] = []
        with Path(path).open(newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if row and not row[0].startswith("#"):
                    self._steps.append(_trace_row(path, number, row))
                    if len(row) != len(self._steps[0]):
                        raise ValueError(
                            f"{path}, line {number}: {len(row)} workers, the first line has "
                            f"{len(self._steps[0])}"
                        )
        if not self._steps:
            raise ValueError(f"{path}: no step in it")

    def seconds(self, rank: int, step: int) -> float:
        """What was recorded for this worker and step, over again at the end."""
        row = self._steps[step % len(self._steps)]
        return row[rank % len(row)]


def _trace_row(path: str | Path, number: int, row: list[str]) -> list[float]:
    try:
        return [
            checks.number("seconds", float(cell), 0, math.inf, open_low=True, open_high=True)
            for cell in row
        ]
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from None


def _uniform(seed: int, rank: int, step: int) -> float:
    """A worker's uniform number in [0, 1) for a step; steps may be asked for in any order."""
    return float(_block(seed, rank, step // _BLOCK)[step % _BLOCK])


@cache
def _block(seed: int, rank: int, index: int) -> npt.NDArray[np.float64]:
    return np.random.default_rng((seed, rank, index)).random(_BLOCK)
