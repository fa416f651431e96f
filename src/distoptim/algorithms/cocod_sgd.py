"""CoCoD-SGD: Local SGD with a whole round hidden."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from distoptim import checks
from distoptim.optimizer import AveragingOptimizer
from distoptim.periods import Tau
from distoptim.rule import Average
from distoptim.settings import Options, Params

if TYPE_CHECKING:
    from typing_extensions import Unpack


@final
class CoCoDSGD(AveragingOptimizer):
    """CoCoD-SGD: the mean of what was sent at one sync corrects the parameters at the next.

    x <- x + (mean - sent), merged tau local steps after the launch, so the workers' mean moves as
    in Local SGD.

    Args:
        params: parameters, param groups or a torch optimizer (`AveragingOptimizer`, also for
            `options`).
        tau: local steps in a round, >= 1, or a period object.
        delay: local steps from launch to merge, in [0, tau]; default tau, which hides the most.
        gmf: of the original code's signature; CoCoD-SGD has no outer momentum, so only 0 is
            allowed.

    Raises:
        ValueError: a value outside its range.

    Source: Shen et al. 2019 (arXiv 1906.12043), algorithm 1.
    """

    def __init__(
        self,
        params: Params,
        *,
        tau: Tau,
        delay: int | None = None,
        gmf: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        checks.no_outer_momentum(type(self).__name__, gmf)
        super().__init__(params, rule=Average(carry=delay != 0), tau=tau, delay=delay, **options)
