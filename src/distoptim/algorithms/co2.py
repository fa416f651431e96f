"""CO2.

Slow momentum with a whole round hidden, a penalty for staleness and a bound on the momentum.
"""

from __future__ import annotations

from typing_extensions import Unpack

from distoptim import checks
from distoptim.algorithms.penalised import Penalised
from distoptim.optimizer import AveragingOptimizer
from distoptim.options import Options, Params
from distoptim.periods import Tau


class CO2(AveragingOptimizer):
    """CO2: every `tau` local steps all restart from an anchor that knows the mean of one round ago.

    m <- clip(outer_momentum m + (z - mean)/gap, -clip, clip); z <- z - outer_lr m; x <- z, after x
    was sent. gap = 1 + |last move of z| / |farthest move of z so far|, in [1, 2]: what is stale
    because z has moved on counts less. That the gap divides the new pseudo-gradient is from the
    authors' code; the gap is ours, after Gap-Aware (arXiv 1909.10802), and bit-equal on all
    workers. docs/algorithms.md says what of the paper is not verified.

    Args:
        params: parameters, param groups or a torch optimizer (`AveragingOptimizer`, also for
            `options`).
        tau: local steps in a round, >= 1, or a period object.
        outer_lr: > 0; default 1, that of the authors' code.
        outer_momentum: in [0, 1); default 0.2, that of the authors' example, and of their code for
            17 to 32 workers.
        clip: bound of each element of the momentum, in units of the parameters, > 0; default 1, as
            there.
        delay: local steps from launch to merge, in [0, tau]; default tau, which hides the most.
        gmf: another name of `outer_momentum`, from the original code.

    Raises:
        ValueError: a value outside its range.

    Source: Sun et al. 2024 (arXiv 2401.16265), but for the gap.
    """

    def __init__(
        self,
        params: Params,
        *,
        tau: Tau,
        outer_lr: float = 1.0,
        outer_momentum: float | None = None,
        clip: float = 1.0,
        delay: int | None = None,
        gmf: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        momentum = checks.outer_momentum(outer_momentum, gmf, default=0.2)
        outer_lr = checks.number("outer_lr", outer_lr, 0, checks.LARGEST, open_low=True)
        clip = checks.number("clip", clip, 0, checks.LARGEST, open_low=True)
        when: Tau = tau if delay is None else checks.integer("delay", delay, 0)
        super().__init__(
            params, rule=Penalised(outer_lr, momentum, clip), tau=tau, delay=when, **options
        )
