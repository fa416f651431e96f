"""Overlap-Local-SGD.

An anchor, moved by a mean that travels while the workers compute, pulls them back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from distoptim import checks
from distoptim.algorithms.anchor import OuterSGD, Pull
from distoptim.optimizer import AveragingOptimizer
from distoptim.periods import Tau
from distoptim.settings import Options, Params

if TYPE_CHECKING:
    from typing_extensions import Unpack


@final
class OverlapLocalSGD(AveragingOptimizer):
    """Overlap-Local-SGD: every `tau` local steps workers are pulled towards an anchor that is one
    round old.

    v <- outer_momentum v + (z - mean); z <- z - v; x <- (1 - alpha) x + alpha z; then x is sent.
    v is rescaled when the learning rate changes. The workers' mean moves at an effective learning
    rate of (1 - alpha) / (1 - alpha outer_momentum) times lr: 0.69 lr at the defaults.

    Args:
        params: parameters, param groups or a torch optimizer (`AveragingOptimizer`, also for
            `options`).
        tau: local steps in a round, >= 1, or a period object.
        alpha: weight of the anchor in the pull, in [0, 1]; default 0.6, the paper's choice for all
            its runs. 0 leaves the workers alone.
        outer_momentum: of the anchor, in [0, 1); default 0.7, the paper's choice.
        delay: local steps from launch to merge, in [0, tau]; default tau, which hides the most.
        gmf: another name of `outer_momentum`, from the original code.

    Raises:
        ValueError: a value outside its range; alpha = 1 at delay = tau, where what is sent is the
            anchor itself.

    Source: Wang, Liang, Joshi 2020 (arXiv 2002.09539), equations 3 to 5 and 10, 11 (momentum).
    """

    def __init__(
        self,
        params: Params,
        *,
        tau: Tau,
        alpha: float = 0.6,
        outer_momentum: float | None = None,
        delay: int | None = None,
        gmf: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        alpha = checks.number("alpha", alpha, 0, 1)
        momentum = checks.outer_momentum(outer_momentum, gmf, default=0.7)
        if alpha == 1 and not checks.is_zero(delay):
            raise ValueError(
                f"alpha=1 with delay={tau if delay is None else delay}: the local steps made "
                "meanwhile would be thrown away; allowed is alpha below 1, or delay=0"
            )
        rule = Pull(OuterSGD(1.0, momentum, rescale=True), alpha)
        super().__init__(params, rule=rule, tau=tau, delay=delay, **options)
