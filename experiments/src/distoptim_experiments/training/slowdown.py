"""Random slow-downs of real workers, drawn from the simulator's streams."""

from __future__ import annotations

import time

from distoptim.simulator.compute import Pareto, ShiftedExponential
from distoptim_experiments.config import RunConfig
from distoptim_experiments.machines import Slowdown, pareto


def seconds(kind: Slowdown, *, mean_ms: float, seed: int, rank: int, step: int) -> float:
    """How much longer worker `rank` takes for its local step `step` (from 0); equal at each call.

    Args:
        kind: "none"; "exponential"; "pareto", which is never less than 0.6 times the mean.
        mean_ms: mean over steps, in milliseconds, > 0 unless `kind` is "none".
        seed: of the streams, one per worker.
        rank, step: of whom, and when.
    """
    if kind == "none":
        return 0.0
    mean_s = mean_ms / 1e3
    drawn: Pareto | ShiftedExponential
    drawn = pareto(mean_s, seed) if kind == "pareto" else ShiftedExponential(0.0, mean_s, seed)
    return drawn.seconds(rank, step)


def wait(config: RunConfig, *, worker: int, step: int) -> None:
    """Be as much later with a real worker's local step as the run says."""
    late_s = seconds(
        config.slowdown, mean_ms=config.slowdown_ms, seed=config.seed, rank=worker, step=step
    )
    if late_s:
        time.sleep(late_s)
