"""The present tau and delay, what the next tau is chosen from, and what each worker's payload weighs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distoptim import checks
from distoptim.periods import Period, Tau, period_of

logger = logging.getLogger("distoptim")


class Pace:
    """How long rounds are now.

    Args:
        tau: local steps in a round, or what chooses them.
        delay: local steps from launch to merge, in [0, the smallest tau]; `tau` itself: always the
            whole round.

    Raises:
        ValueError: a value outside its range; HideCommunication with another delay than the whole
            round.
    """

    def __init__(self, tau: Tau, delay: Tau) -> None:
        self.period: Period = period_of(tau)
        self.whole = delay is tau or delay == tau
        self._delay = 0 if self.whole else checks.integer("delay", delay, 0, self.period.smallest)
        if "communication_s" in self.period.measures and not self.whole:
            raise ValueError(
                f"delay={delay} with tau={tau!r}: a longer round hides no more at a fixed delay; leave "
                "delay away, in an algorithm where it is then the whole round"
            )
        self._tau = self.period.first
        self.synchronous = self.period.start > 0
        self.memory: dict[str, float] = {}
        self.means: dict[str, float] = {}
        self.losses: list[Tensor | float] = []
        self.samples: float | None = None
        self._counts: bool | None = None
        self.left_at: int | None = None
        self.mark: tuple[float, int] | None = None

    @property
    def tau(self) -> int:
        """Local steps in a round."""
        return 1 if self.synchronous else self._tau

    @property
    def delay(self) -> int:
        """Local steps from launch to merge."""
        return 0 if self.synchronous else self._tau if self.whole else self._delay

    def change(self, step: int) -> bool:
        """Choose the next round's tau; whether it is another one."""
        if self.synchronous:
            return False
        new, why = self.period.choose(step, self._tau, self.means, self.memory)
        self.means = {}
        if new == self._tau:
            return False
        logger.info("local step %d: tau %d -> %d: %s", step, self._tau, new, why)
        self._tau = new
        return True

    def report(self, loss: Tensor | float | None, samples: float | None) -> None:
        """Note what `average` was told of a local step, without reading it."""
        if loss is not None and "loss" in self.period.measures:
            self.losses.append(loss.detach() if isinstance(loss, Tensor) else float(loss))
        if samples is not None:
            self.samples = (self.samples or 0.0) + checks.number(
                "samples", samples, 0, checks.LARGEST
            )

    def counts(self, samples: bool) -> None:
        """Note whether a local step comes with its samples.

        Raises:
            ValueError: it does and others did not, or the other way round: the round's weight would
                be a part of it.
        """
        if self._counts is None:
            self._counts = samples or self.samples is not None
        if samples != self._counts:
            raise ValueError(
                f"average() {'with' if samples else 'without'} samples= after steps "
                f"{'without' if samples else 'with'}; allowed is at every step or never"
            )

    def measure(
        self, *, step: int, computed_s: float, communication_s: float, lr: float
    ) -> list[Tensor | float]:
        """What this worker sends of `Period.measures`, over the time since it was last asked.

        Raises:
            ValueError: a loss is wanted and none was reported.
        """
        if self.synchronous or not self.period.measures:
            return []
        mark, self.mark = self.mark, (computed_s, step)
        values: dict[str, Tensor | float] = {"lr": lr, "communication_s": communication_s}
        if mark is not None:
            values["step_s"] = (computed_s - mark[0]) / max(1, step - mark[1])
        if "loss" in self.period.measures and self.left_at is None:
            if not self.losses:
                raise ValueError(
                    f"tau={self.period!r} follows the loss: allowed is average(loss=loss) at every step"
                )
            values["loss"] = torch.stack([torch.as_tensor(x) for x in self.losses]).float().mean()
        self.losses.clear()
        return [values.get(name, 0.0) for name in self.period.measures]

    def told(self, means: Sequence[float]) -> None:
        """Keep the workers' means of what they measured; all are 0 where nobody has yet."""
        if any(means):
            self.means = dict(zip(self.period.measures, means, strict=True))

    def weight(self, *, step: int, since: int, samples: float) -> float:
        """What this worker's payload weighs.

        Its samples since the last launch, or its share of local steps made.
        """
        if self.samples is not None:
            return self.samples - samples
        if self.left_at is None:
            return 1.0
        return max(0, min(self.left_at, step) - since) / max(1, step - since)

    def share(self, mean: float) -> float:
        """Of the workers, how many are in a mean of this mean weight; weights by samples do not
        tell, and count as 1.

        Raises:
            ValueError: others weigh by samples, this worker does not.
        """
        if self.samples is None and self.left_at is None and mean > 1.001:
            raise ValueError(
                "another worker calls average(samples=...), this one does not; allowed is on all or none"
            )
        return min(mean, 1.0)

    def save(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "period": repr(self.period),
            "whole": self.whole,
            "tau": self._tau,
            "memory": dict(self.memory),
            "means": dict(self.means),
            "losses": [float(x) for x in self.losses],
            "samples": self.samples,
        }

    def load(self, saved: dict[str, Any]) -> bool:
        """Take over a saved state of the same period; whether it was one."""
        if (saved["period"], saved["whole"]) != (repr(self.period), self.whole):
            return False
        self._tau, self.samples = saved["tau"], saved["samples"]
        self._counts = None
        self.memory, self.means, self.losses = (
            dict(saved["memory"]),
            dict(saved["means"]),
            list(saved["losses"]),
        )
        return True
