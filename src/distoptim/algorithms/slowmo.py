"""SlowMo: slow momentum around local SGD."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from distoptim import checks
from distoptim.algorithms.anchor import OuterSGD, adopting
from distoptim.optimizer import AveragingOptimizer
from distoptim.periods import Tau
from distoptim.settings import Options, Params

if TYPE_CHECKING:
    from typing_extensions import Unpack


@final
class SlowMo(AveragingOptimizer):
    """SlowMo: every `tau` local steps the anchor takes a momentum step to the mean; all restart
    from it.

    u <- slow_momentum u + (z - mean)/lr; z <- z - slow_lr lr u; x <- z. Kept as v = lr u, so that
    lr = 0 is legal.

    Args:
        params: parameters, param groups or a torch optimizer (`AveragingOptimizer`, also for
            `options`).
        tau: local steps in a round, >= 1, or a period object.
        slow_momentum: beta, in [0, 1); default 0.7 (the paper uses 0.4 to 0.8, fairscale 0.5).
        slow_lr: > 0; default 1, the paper's choice.
        delay: local steps from launch to merge, in [0, tau]; default 0. Above 0 only with `carry`.
        carry: keep the local steps made between launch and merge, x <- z + (x - sent); default
            False.
        gmf: another name of `slow_momentum`, from the original code.

    Raises:
        ValueError: a value outside its range; a delay without carry, which would throw local steps
            away.

    Source: Wang, Tantia, Ballas, Rabbat 2019 (arXiv 1910.00643), algorithm 1.
    """

    def __init__(
        self,
        params: Params,
        *,
        tau: Tau,
        slow_momentum: float | None = None,
        slow_lr: float = 1.0,
        delay: int | None = 0,
        carry: bool = False,
        gmf: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        momentum = checks.outer_momentum(slow_momentum, gmf, default=0.7, name="slow_momentum")
        slow_lr = checks.number("slow_lr", slow_lr, 0, checks.LARGEST, open_low=True)
        outer = OuterSGD(slow_lr, momentum, rescale=True)
        super().__init__(
            params,
            rule=lambda _: adopting(outer, delay=delay, carry=carry),
            tau=tau,
            delay=delay,
            **options,
        )
