"""Periods that choose themselves: by what communication takes, or by the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from distoptim import checks
from distoptim.period import Change, Period


@dataclass(frozen=True)
class HideCommunication(Period):
    """The smallest tau that hides the means behind computation, as measured: ceil((1 + margin)
    communication / step).

    Both times are measured by every worker and their means travel with the parameters, so that all
    workers decide alike and nothing waits for it. tau comes down only where twice the margin would
    fit, lest it swing. It needs an algorithm whose delay is the whole round.

    Args:
        smallest: bound of tau, and where it begins, >= 1.
        largest: bound of tau, >= smallest.
        margin: time left over, as a share of the communication's, in [0, 10]; default 0.1, against
            jitter.

    Raises:
        ValueError: a value outside its range.
    """

    smallest: int = 1
    largest: int = 1000
    margin: float = 0.1
    measures = ("step_s", "communication_s")

    def __post_init__(self) -> None:
        """Check the ranges."""
        checks.integer("smallest", self.smallest, 1)
        checks.integer("largest", self.largest, self.smallest)
        checks.number("margin", self.margin, 0, 10)

    def choose(
        self, step: int, tau: int, means: Mapping[str, float], memory: dict[str, float]
    ) -> Change:
        """From the ratio of the two times."""
        if not means or means["communication_s"] <= 0 or means["step_s"] <= 0:
            return tau, "nothing measured yet"
        ratio = means["communication_s"] / means["step_s"]
        enough, plenty = (self._bound(math.ceil(ratio * (1 + k * self.margin))) for k in (1, 2))
        why = f"communication takes {ratio:.2f} local steps of {1e3 * means['step_s']:.3g} ms"
        return (enough if enough > tau else min(plenty, tau)), why

    def _bound(self, tau: int) -> int:
        return min(max(tau, self.smallest), self.largest)


@dataclass(frozen=True)
class AdaComm(Period):
    """tau falls with the loss: tau = ceil(tau0 sqrt(loss / loss0)), once every `interval` local
    steps.

    Where that is no smaller than before, tau <- ceil(gamma tau). Report the loss with
    `average(loss=loss)`; what counts is its mean over the workers and the interval, and loss0 is
    that of the first round.

    Args:
        tau0: the first tau, >= 1.
        interval: local steps between two decisions, >= 1; the paper has 60 seconds, on which
            workers cannot agree.
        gamma: factor where the loss is stuck, in (0, 1); default 0.5, the paper's.
        follow_lr: tau = ceil(tau0 sqrt(lr0 / lr loss / loss0)) instead, so that a learning rate
            that decays makes rounds longer. lr0 is the largest so far, not the first, which a
            warm-up would make too small; gamma then waits for intervals with an unchanged lr. Both
            are our choice; without warm-up lr0 is the paper's.
        largest: bound of tau, >= tau0.

    Raises:
        ValueError: a value outside its range.

    Source: Wang, Joshi 2018 (arXiv 1810.08313), section 4.
    """

    tau0: int
    interval: int = 100
    gamma: float = 0.5
    follow_lr: bool = False
    largest: int = 1000
    measures = ("loss", "lr")

    def __post_init__(self) -> None:
        """Check the ranges."""
        checks.integer("tau0", self.tau0, 1)
        checks.integer("interval", self.interval, 1)
        checks.number("gamma", self.gamma, 0, 1, open_low=True, open_high=True)
        checks.flag("follow_lr", self.follow_lr)
        checks.integer("largest", self.largest, self.tau0)

    @property
    def smallest(self) -> int:
        """One: the loss may fall to nothing."""
        return 1

    @property
    def first(self) -> int:
        """tau0."""
        return self.tau0

    def choose(
        self, step: int, tau: int, means: Mapping[str, float], memory: dict[str, float]
    ) -> Change:
        """From the mean loss of the interval, where one ends."""
        if not means or not all(map(math.isfinite, means.values())):
            return tau, "no loss"
        loss, lr = means["loss"], means["lr"]
        if "loss0" not in memory:
            memory.update(loss0=loss, lr0=lr, lr=lr, since=step, sum=0.0, rounds=0)
            return tau, "the first loss"
        memory["sum"] += loss
        memory["rounds"] += 1
        if step - memory["since"] < self.interval:
            return tau, "within an interval"
        loss = memory["sum"] / memory["rounds"]
        same_lr = memory["lr"] == lr
        memory.update(sum=0.0, rounds=0, since=step, lr=lr, lr0=max(memory["lr0"], lr))
        ratio = max(loss, 0.0) / memory["loss0"] if memory["loss0"] > 0 else 1.0
        if self.follow_lr and memory["lr0"] > 0:
            ratio = ratio * memory["lr0"] / lr if lr > 0 else math.inf
        new = max(1, math.ceil(min(self.largest, self.tau0 * math.sqrt(ratio))))
        if new >= tau and (same_lr or not self.follow_lr):
            return math.ceil(self.gamma * tau), f"the loss is stuck at {loss:.4g}"
        return new, f"loss {loss:.4g}, at first {memory['loss0']:.4g}"
