"""How the ranks of a run agree on when to stop."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from distoptim_experiments.training.signals import StopSignals
from distoptim_experiments.training.world import World


class StopVote:
    """Lets all workers stop after the same step when one was told to.

    An all-reduce (maximum) of [signal, seconds per step, whether the run can go on] travels in the
    background and is read some steps later, about four times a second at the slowest worker's pace:
    nobody waits for it.
    """

    def __init__(self, world: World, signals: StopSignals) -> None:
        self._world = world
        self._signals = signals
        self._due = 1
        self._ballot: torch.Tensor | None = None
        self._work: Any = None

    def verdict(self, steps: int, step_s: float, goes_on: bool) -> int:
        """The signal for which all stop now, or 0.

        Args:
            steps: local steps made since the start of this process, equal on all workers.
            step_s: seconds a step takes here.
            goes_on: whether the run could, for all that this worker knows (see `evaluation.goes_on`).

        Raises:
            FloatingPointError: on all workers: no one's could.
        """
        if steps < self._due:
            return 0
        signum, pace, alive = self._read()
        if signum:
            return signum
        if not alive:
            raise FloatingPointError("no worker's loss is finite")
        self._due = steps + (max(1, min(1000, round(0.25 / pace))) if pace else 1)
        self._ballot = torch.tensor([self._signals.received, step_s, goes_on], dtype=torch.float64)
        self._work = dist.all_reduce(
            self._ballot, dist.ReduceOp.MAX, self._world.control, async_op=True
        )
        return 0

    def close(self) -> int:
        """Read the last vote, so that nothing is in flight; returns its signal."""
        return self._read()[0]

    def _read(self) -> tuple[int, float, bool]:
        if self._work is None or self._ballot is None:
            return 0, 0.0, True
        self._work.wait()
        self._work = None
        return int(self._ballot[0]), float(self._ballot[1]), bool(self._ballot[2])
