"""Local SGD, with or without an outer momentum, with or without a delay."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from distoptim import checks
from distoptim.algorithms.anchor import OuterSGD, adopting
from distoptim.optimizer import AveragingOptimizer
from distoptim.periods import Tau
from distoptim.rule import Average, Rule
from distoptim.settings import Options, Params

if TYPE_CHECKING:
    from typing_extensions import Unpack


@final
class LocalSGD(AveragingOptimizer):
    """Local SGD: parameters are averaged every `tau` local steps.

    Blocking (delay 0): x <- mean. Delayed: x <- x + (mean - sent), which keeps the steps made
    meanwhile.
    With outer momentum: v <- outer_momentum v + (z - mean); z <- z - v; x <- z, v rescaled when the
    learning rate changes (what the code of Overlap-Local-SGD calls BMUF).

    Args:
        params: parameters, param groups or a torch optimizer (`AveragingOptimizer`, also for
            `options`).
        tau: local steps in a round, >= 1, or a period object.
        delay: local steps from launch to merge, in [0, tau]; default 0. tau makes it CoCoD-SGD.
        outer_momentum: in [0, 1), default 0; above 0 with a delay only if `carry`.
        carry: with outer momentum, keep the local steps made between launch and merge, x <- z + (x
            - sent); default False. Without outer momentum they are always kept.
        gmf: another name of `outer_momentum`, from the original code.

    Raises:
        ValueError: a value outside its range; outer momentum and a delay without carry, since
            adopting a late anchor would throw the steps made meanwhile away.

    Source: Stich 2018 (arXiv 1805.09767), algorithm 1; delayed: DaSGD (arXiv 2006.00441).
    """

    def __init__(
        self,
        params: Params,
        *,
        tau: Tau,
        delay: int | None = 0,
        outer_momentum: float | None = None,
        carry: bool = False,
        gmf: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        momentum = checks.outer_momentum(outer_momentum, gmf, default=0.0)
        checks.flag("carry", carry)

        def rule(_: int) -> Rule:
            if momentum:
                outer = OuterSGD(1.0, momentum, rescale=True)
                return adopting(outer, delay=delay, carry=carry)
            return Average(carry=delay != 0)

        super().__init__(params, rule=rule, tau=tau, delay=delay, **options)
