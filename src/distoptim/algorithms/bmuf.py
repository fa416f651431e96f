"""BMUF: blockwise model-update filtering."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from distoptim import checks
from distoptim.algorithms.anchor import OuterSGD, adopting
from distoptim.optimizer import AveragingOptimizer
from distoptim.periods import Tau
from distoptim.rule import Rule
from distoptim.settings import Options, Params

if TYPE_CHECKING:
    from typing_extensions import Unpack


@final
class BMUF(AveragingOptimizer):
    """BMUF: every `tau` local steps the mean is filtered through a block momentum; all restart from
    the result.

    Classic: v <- block_momentum v + block_lr (mean - z); z <- z + v; x <- z.
    Nesterov: the same with z the point last restarted from, w = z + block_momentum v.

    Args:
        params: parameters, param groups or a torch optimizer (`AveragingOptimizer`, also for
            `options`).
        tau: local steps in a block, >= 1, or a period object.
        block_momentum: eta, in [0, 1); default 1 - 1/m for m workers, so that a block counts as in
            one-worker training.
        block_lr: zeta, > 0; default 1.
        nesterov_block: Nesterov block momentum instead of the classic one; default False.
            Microsoft's CNTK has it on, and forgets the inner momentum at every block, which here is
            `reset_inner=True`.
        delay: local steps from launch to merge, in [0, tau]; default 0. Above 0 only with `carry`.
        carry: keep the local steps made between launch and merge, x <- z + (x - sent); default
            False.
        gmf: another name of `block_momentum`, from the original code.

    Raises:
        ValueError: a value outside its range; a delay without carry, which would throw local steps
            away.

    Source: Chen & Huo, ICASSP 2016, equations 4 to 10.
    """

    def __init__(
        self,
        params: Params,
        *,
        tau: Tau,
        block_momentum: float | None = None,
        block_lr: float = 1.0,
        nesterov_block: bool = False,
        delay: int | None = 0,
        carry: bool = False,
        gmf: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        block_lr = checks.number("block_lr", block_lr, 0, checks.LARGEST, open_low=True)
        checks.flag("nesterov_block", nesterov_block)

        def rule(workers: int) -> Rule:
            momentum = checks.outer_momentum(
                block_momentum, gmf, default=1 - 1 / workers, name="block_momentum"
            )
            outer = OuterSGD(block_lr, momentum, nesterov=nesterov_block and momentum > 0)
            return adopting(outer, delay=delay, carry=carry)

        super().__init__(params, rule=rule, tau=tau, delay=delay, **options)
