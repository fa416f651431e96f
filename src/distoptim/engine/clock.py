"""The present tau and delay, and what the next tau is chosen from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from distoptim.periods import Period

logger = logging.getLogger("distoptim")


@final
class Clock:
    """How long rounds are now; equal on all workers, since it follows only from what they share.

    Args:
        period: chooses tau.
        delay: local steps from launch to merge; None: the whole round.

    Attributes:
        tau: local steps in a round.
        delay: local steps from launch to merge.
        fixed: whether tau is always the same.
        synchronous: whether the workers average after every local step at present (`PostLocal`).
        means: the workers' means of what the period measures, since it was last asked.
        expected_s: seconds of a round's means as the link was measured, until the first round has ended;
            0 where nobody asks.
        timed: whether a round lasts some seconds at present, not tau local steps (`EqualTime`).
    """

    def __init__(self, period: Period, delay: int | None) -> None:
        self.period = period
        whole = period.choices == frozenset([delay])
        self._delay = None if whole else delay
        self._tau = period.first
        self.fixed = period.choices is not None and len(period.choices) == 1
        self.synchronous = period.start > 0
        # Plain numbers, since the engine reads them several times at every launch and merge.
        self.tau = 0
        self.delay = 0
        self._set()
        self.memory: dict[str, float] = {}
        self.means: dict[str, float] = {}
        self._losses: list[Tensor | float] = []
        self._mark: tuple[float, int] | None = None
        self.expected_s = 0.0
        # Of a timed round: seconds of computation at its start and at its end, and its first step.
        self._began_s = 0.0
        self._ends_s = 0.0
        self._began_at = 0

    def _set(self) -> None:
        self.timed = self.period.round_s is not None and not self.synchronous
        self.tau = 1 if self.synchronous else self._tau
        self.delay = self._tau if self._delay is None else self._delay
        if self.synchronous:
            self.delay = 0

    def expect(self, communication_s: float) -> None:
        """How long a round's means should take: a period that hides them begins by it."""
        tau = self.period.first_timed
        if tau is not None and communication_s > 0:
            self.expected_s = communication_s
            self._tau = tau
            self._set()

    def expected(self, step_s: float) -> None:
        """Take what was expected for measured, of local steps that take so long on the mean."""
        self.means = {"step_s": step_s, "communication_s": self.expected_s}
        self.expected_s = 0.0

    def synchronise(self, synchronous: bool) -> None:
        """Begin or end the phase in which the workers average after every local step."""
        self.synchronous = synchronous
        self._set()

    @property
    def hides_whole_round(self) -> bool:
        """Whether merge and next launch fall together, whatever tau is."""
        return self._delay is None

    def advance(self, step: int) -> bool:
        """A round ends at this local step: choose the next one's tau; whether it is another one."""
        if self.synchronous:
            return False
        if self.timed:
            return self._advance_time(step)
        tau, why = self.period.choose(step, self._tau, self.means, self.memory)
        self.means = {}
        if tau == self._tau:
            return False
        logger.info("local step %d: tau %d -> %d: %s", step, self._tau, tau, why)
        self._tau = tau
        self._set()
        return True

    def _advance_time(self, step: int) -> bool:
        """A timed round ends: note how many local steps it had, here and on the mean."""
        if self.means:
            # An integer, so that what follows from it is the same number on every worker.
            self.memory["steps"] = float(max(1, round(self.means["steps"])))
        self.means = {}
        self._tau = max(1, step - self._began_at)
        self._set()
        return False

    def begin_time(self, step: int, computed_s: float, *, anew: bool = True) -> None:
        """A timed round begins at this local step, after so many seconds of computation.

        Args:
            step: local steps done.
            computed_s: time of computation so far.
            anew: it follows no other; else it ends `round_s` after the end of the one before, so that
                what that one took longer is made up for, but for more than half a round.
        """
        round_s = self.period.round_s
        if round_s is None:
            return
        self._began_at = step
        self._began_s = computed_s
        self._ends_s += round_s
        if anew or not round_s / 2 <= self._ends_s - computed_s <= 1.5 * round_s:
            self._ends_s = computed_s + round_s

    def time_is_up(self, step: int, computed_s: float) -> bool:
        """Whether the next local step would end farther from the round's end than this one."""
        each = (computed_s - self._began_s) / max(1, step - self._began_at)
        return computed_s + each / 2 >= self._ends_s

    def report(self, loss: Tensor | float) -> None:
        """Note a local step's loss, without reading it: that would stop a GPU."""
        if "loss" in self.period.measures:
            self._losses.append(loss.detach() if isinstance(loss, Tensor) else float(loss))

    def measure(
        self, *, step: int, computed_s: float, communication_s: float, lr: float, has_data: bool
    ) -> list[Tensor | float]:
        """What this worker sends along for the period, over the time since it was last asked.

        Args:
            step: local steps done.
            computed_s: time of computation so far.
            communication_s: of all means of the last round.
            lr: the inner learning rate.
            has_data: whether this worker makes steps of its own (see `join`).

        Raises:
            ValueError: a loss is wanted and none was reported.
        """
        if self.synchronous or not self.period.measures:
            return []
        mark = self._mark
        self._mark = (computed_s, step)
        local: dict[str, Tensor | float] = {"lr": lr, "communication_s": communication_s}
        local["steps"] = self.tau
        if mark is not None:
            local["step_s"] = (computed_s - mark[0]) / max(1, step - mark[1])
        if "loss" in self.period.measures and has_data:
            if not self._losses:
                raise ValueError(
                    f"tau={self.period!r} follows the loss: allowed is average(loss=loss) at every "
                    "step"
                )
            local["loss"] = torch.stack([torch.as_tensor(x) for x in self._losses]).float().mean()
        self._losses.clear()
        return [local.get(name, 0.0) for name in self.period.measures]

    def told(self, means: Sequence[float]) -> None:
        """Keep the workers' means of what they measured; all are 0 where nobody has yet."""
        if any(means):
            self.means = dict(zip(self.period.measures, means, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "period": repr(self.period),
            "whole": self.hides_whole_round,
            "tau": self._tau,
            "memory": dict(self.memory),
            "means": dict(self.means),
            "losses": [float(x) for x in self._losses],
        }

    def time_state(self, computed_s: float) -> list[float]:
        """Of a timed round: its first step, seconds since then, and until its end."""
        return [self._began_at, computed_s - self._began_s, self._ends_s - computed_s]

    def load_time(self, saved: Sequence[float], computed_s: float) -> None:
        """Go on in the middle of a timed round."""
        self._began_at = int(saved[0])
        self._began_s = computed_s - saved[1]
        self._ends_s = computed_s + saved[2]

    def load_state_dict(self, saved: dict[str, Any]) -> bool:
        """Take over a saved state of the same period; whether it was one."""
        if (saved["period"], saved["whole"]) != (repr(self.period), self.hides_whole_round):
            return False
        self._tau = saved["tau"]
        self._set()
        self.memory = dict(saved["memory"])
        self.means = dict(saved["means"])
        self._losses = list(saved["losses"])
        return True
