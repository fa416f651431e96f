"""Random slow-downs of real workers, drawn from the simulator's streams."""

from __future__ import annotations

from collections.abc import Callable

from distoptim.simulator.compute import Pareto, ShiftedExponential

# Mean scale shape / (shape - 1), as the simulator's.
_SHAPE = 2.5


def _exponential(mean_s: float, seed: int) -> ShiftedExponential:
    return ShiftedExponential(0.0, mean_s, seed)


def _pareto(mean_s: float, seed: int) -> Pareto:
    return Pareto(mean_s * (_SHAPE - 1) / _SHAPE, _SHAPE, seed)


SLOWDOWNS: dict[str, Callable[[float, int], ShiftedExponential | Pareto] | None] = {
    "none": None,
    "exponential": _exponential,
    "pareto": _pareto,
}


def seconds(kind: str, *, mean_ms: float, seed: int, rank: int, step: int) -> float:
    """How much longer worker `rank` takes for its local step `step` (from 0); equal at each call.

    Args:
        kind: "none"; "exponential"; "pareto" with shape 2.5, never less than 0.6 times the mean.
        mean_ms: mean over steps, in milliseconds, > 0 unless `kind` is "none".
        seed: of the streams, one per worker.
        rank, step: of whom, and when.
    """
    make = SLOWDOWNS[kind]
    return 0.0 if make is None else make(mean_ms / 1e3, seed).seconds(rank, step)
