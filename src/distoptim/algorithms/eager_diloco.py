"""Eager DiLoCo: a whole round hidden, with the worker's own share of it at once."""

from __future__ import annotations

from typing_extensions import Unpack

from distoptim.algorithms.diloco import outer_rule
from distoptim.algorithms.late import Late
from distoptim.checks import flag, integer
from distoptim.optimizer import AveragingOptimizer
from distoptim.options import Options, Params, workers
from distoptim.periods import Tau


class EagerDiLoCo(AveragingOptimizer):
    """Eager DiLoCo: the mean pseudo-gradient comes a round late; the worker's own part of it is
    used at once.

    The paper's step on g~ = mean g(stale) + (g_i(fresh) - g_i(stale))/m differs between workers,
    and so would the outer state. Nesterov SGD is linear, so the differences add up to one step on
    the worker's own part: z <- OuterSGD(z, mean g(stale)), bit-equal on all workers; u <- beta u +
    g_i(fresh); x <- z - outer_lr/m (g_i(fresh) + beta u). The same numbers, and a shared anchor.

    Args:
        params: parameters, param groups or a torch optimizer (`AveragingOptimizer`, also for
            `options`).
        tau: local steps in a round, >= 1, or a period object.
        outer_lr: > 0; default 0.4, the paper's choice.
        outer_momentum: beta, in [0, 1); default 0.9, the paper's choice.
        outer_nesterov: Nesterov's form of it; default True, the paper's choice. Classic: x <- z -
            outer_lr/m u.
        delay: local steps from launch to merge, in [0, tau]; default tau, which hides the most.
        eager: use the own part; default True. False restarts from the late anchor alone: the
            paper's "delayed outer gradients", which it found to be worse, though less so with a
            smaller outer_lr.
        gmf: another name of `outer_momentum`, from the original code.

    Raises:
        ValueError: a value outside its range.

    Source: Kale, Douillard, Donchev 2025 (arXiv 2502.12996), algorithm 3; without `eager` algorithm
        2.
    """

    def __init__(
        self,
        params: Params,
        *,
        tau: Tau,
        outer_lr: float | None = None,
        outer_momentum: float | None = None,
        outer_nesterov: bool | None = None,
        delay: int | None = None,
        eager: bool = True,
        gmf: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        plain = outer_rule(None, outer_lr, outer_momentum, gmf, outer_nesterov, lr=0.4, alpha=1.0)
        when: Tau = tau if delay is None else integer("delay", delay, 0)
        rule = Late(**vars(plain), share=1 / workers(options) if flag("eager", eager) else 0.0)
        super().__init__(params, rule=rule, tau=tau, delay=when, **options)
