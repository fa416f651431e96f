"""Elastic Averaging SGD, blocking or overlapped."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import Unpack

from distoptim import checks
from distoptim.algorithms.rules import Anchored, AnchorRule
from distoptim.fragments import Flat, Fragment
from distoptim.optimizer import AveragingOptimizer
from distoptim.options import Options, Params, workers
from distoptim.periods import Tau
from distoptim.rule import Mean, State


@dataclass(frozen=True)
class Elastic(AnchorRule):
    """Worker and anchor pull each other: x <- x - alpha (x - z) at launch, z <- z + alpha sum (x_i
    - z) at merge.

    Both use the values before either moved, so the delay of the merge does not change x.

    Args:
        alpha: the elastic strength, in (0, 2/(m+1)).
    """

    alpha: float

    def launched(self, fragment: Fragment, state: State, sent: Flat) -> None:
        """x <- x - alpha (x - z)."""
        assert isinstance(state, Anchored)
        fragment.pull(state.anchor, self.alpha)

    def merge(self, fragment: Fragment, state: State, mean: Mean) -> None:
        """z <- z + alpha workers (mean - z)."""
        assert isinstance(state, Anchored)
        state.anchor.tensor.lerp_(mean.flat.tensor[: fragment.numel], self.alpha * mean.workers)


class EASGD(AveragingOptimizer):
    """Elastic Averaging SGD: workers and anchor are tied by a spring; with Nesterov inner SGD it is
    EAMSGD.

    Every `tau` local steps, from the values before either moved:
    x <- x - alpha (x - z) and z <- z + alpha sum_i (x_i - z).
    The anchor is needed at the next sync only, so its mean can travel for a whole round without
    changing x.

    Args:
        params: parameters, param groups or a torch optimizer (`AveragingOptimizer`, also for
            `options`).
        tau: local steps in a round, >= 1, or a period object.
        alpha: elastic strength, in (0, 2/(m+1)) for m workers, outside of which the anchor
            oscillates and diverges; default 1/(m+1), which contracts it fastest.
        delay: local steps from launch to merge, in [0, tau]; default tau, which hides the most; 0
            blocks.
        gmf: of the original code's signature; EASGD has no outer momentum, so only 0 is allowed.

    Raises:
        ValueError: a value outside its range.

    Source: Zhang, Choromanska, LeCun 2015 (arXiv 1412.6651), equations 5 and 6 (synchronous form).
    """

    def __init__(
        self,
        params: Params,
        *,
        tau: Tau,
        alpha: float | None = None,
        delay: int | None = None,
        gmf: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        checks.no_outer_momentum(type(self).__name__, gmf)
        m = workers(options)
        alpha = (
            1 / (m + 1)
            if alpha is None
            else checks.number("alpha", alpha, 0, 2 / (m + 1), open_low=True, open_high=True)
        )
        when: Tau = tau if delay is None else checks.integer("delay", delay, 0)
        super().__init__(params, rule=Elastic(alpha), tau=tau, delay=when, **options)
