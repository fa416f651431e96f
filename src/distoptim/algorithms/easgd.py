"""Elastic Averaging SGD, blocking or overlapped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from distoptim import checks
from distoptim.algorithms.anchor import Anchored, shared_fields, start_anchor
from distoptim.fragments import Flat, Fragment
from distoptim.optimizer import AveragingOptimizer
from distoptim.periods import Tau
from distoptim.rule import Mean, Rule, State
from distoptim.settings import Options, Params

if TYPE_CHECKING:
    from typing_extensions import Unpack


@final
@dataclass(frozen=True)
class Spring(Rule):
    """Worker and anchor pull each other.

    x <- x - alpha (x - z) at the launch; z <- z + alpha sum (x_i - z) at the merge. Both use the values
    before either moved, so the delay of the merge does not change x.

    Args:
        alpha: the elastic strength, in (0, 2/(m+1)).
        most: m; where workers come and go there may be more, and pull the anchor as if they were so many.
    """

    alpha: float
    most: int

    def start(self, fragment: Fragment) -> State:
        """The start as anchor."""
        return Anchored(start_anchor(fragment))

    def sent(self, fragment: Fragment, state: State, sent: Flat) -> None:
        """x <- x - alpha (x - z)."""
        assert isinstance(state, Anchored)
        fragment.pull(state.anchor, self.alpha)

    def merge(self, fragment: Fragment, state: State, mean: Mean) -> None:
        """z <- z + alpha workers (mean - z)."""
        assert isinstance(state, Anchored)
        payload = mean.flat.tensor[: fragment.numel]
        state.anchor.tensor.lerp_(payload, self.alpha * min(mean.workers, self.most))

    def abandoned(self, fragment: Fragment, state: State, sent: Flat | None) -> None:
        """x <- x + alpha (sent - z): the anchor was not pulled, so x was not either."""
        assert isinstance(state, Anchored)
        if sent is not None:
            sent.tensor[: fragment.numel].sub_(state.anchor.tensor)
            fragment.add(sent, weight=self.alpha)

    def shared(self, state: State) -> Mapping[str, Any]:
        """The anchor: all of the state."""
        return shared_fields(state)


@final
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

        def rule(workers: int) -> Rule:
            if alpha is None:
                return Spring(1 / (workers + 1), workers)
            limit = 2 / (workers + 1)
            strength = checks.number("alpha", alpha, 0, limit, open_low=True, open_high=True)
            return Spring(strength, workers)

        super().__init__(params, rule=rule, tau=tau, delay=delay, **options)
