"""What a loop that a framework owns asks of an optimizer, and what it logs of it."""

from __future__ import annotations

from distoptim.optimizer import AveragingOptimizer


def check(optimizer: AveragingOptimizer) -> None:
    """Whether it does without what `average(...)` would be told.

    Raises:
        ValueError: tau follows the loss, of which an optimizer's step hears nothing.
    """
    measures = optimizer.engine.clock.period.measures
    if "loss" in measures:
        raise ValueError(
            f"tau={optimizer.engine.clock.period!r} follows the loss, which a trainer does not hand to an "
            "optimizer: allowed are an integer and other periods"
        )


def logged(optimizer: AveragingOptimizer) -> dict[str, float]:
    """What trainers log of an optimizer's `stats()`: under "distoptim/", times as shares."""
    stats = optimizer.stats()
    names = ("tau", "syncs", "staleness", "quarantined")
    exposed = {"distoptim/exposed_pct": 100 * stats["exposed_share"]}
    return exposed | {f"distoptim/{name}": float(stats[name]) for name in names}
