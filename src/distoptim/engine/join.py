"""Workers that have different numbers of local steps to make."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from distoptim.engine.engine import Engine


@contextlib.contextmanager
def join(engine: Engine, tick: Callable[[], None]) -> Iterator[None]:
    """Go on without data until nobody has any, then take over the workers' mean.

    That all have run out is seen in a mean to which nobody has added anything, at the same step by
    all. So no message is needed beside the means; torch's Join has a blocking one at every local
    step.

    Args:
        engine: whose means these are.
        tick: counts a local step.
    """
    pace = engine.pace
    step, samples = engine.step, pace.samples or 0.0
    yield
    made = engine.step - step if pace.samples is None else pace.samples - samples
    pace.left_at = engine.step
    while not engine.ended:
        tick()
    _end(engine, made)


@torch.no_grad()
def _end(engine: Engine, weight: float) -> None:
    """Drop what is in flight of workers that have all run out of data.

    X <- weighted mean, and begin anew.
    """
    engine.drain()
    for slot in engine.slots:
        mean = engine.mean_of(slot.fragment, weight, may_be_empty=True)
        if mean.tensor[-1]:
            slot.fragment.write(mean)
        slot.launched, slot.samples = engine.step, engine.pace.samples or 0.0
        engine.place(slot)
    engine.ended, engine.pace.left_at = False, None
    engine.resume_at(engine.step)
