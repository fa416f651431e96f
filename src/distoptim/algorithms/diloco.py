"""DiLoCo: an outer optimizer on the anchor, and any inner optimizer on the workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from distoptim import checks
from distoptim.algorithms.anchor import (
    OuterFactory,
    OuterOptimizer,
    OuterSGD,
    OuterStep,
    Pull,
    adopting,
)
from distoptim.optimizer import AveragingOptimizer
from distoptim.periods import Tau
from distoptim.rule import Rule
from distoptim.settings import Options, Params

if TYPE_CHECKING:
    from typing_extensions import Unpack


@final
class DiLoCo(AveragingOptimizer):
    """DiLoCo: every `tau` local steps the outer optimizer steps on the mean pseudo-gradient; all
    restart from it.

    z <- OuterOpt(z, g) with g = z - mean; x <- z (delay 0), x <- z + (x - sent) with `carry`, or
    x <- local_weight x + (1 - local_weight) z. Made for an inner AdamW:
    `DiLoCo(torch.optim.AdamW(...), tau=50)`.

    Args:
        params: parameters, param groups or a torch optimizer (`AveragingOptimizer`, also for
            `options`).
        tau: local steps in a round, >= 1, or a period object.
        outer: list of anchor tensors -> torch optimizer that moves them; default SGD with the three
            that follow. An outer Adam: `lambda anchors: torch.optim.Adam(anchors, lr=0.3,
            betas=(0.9, 0.95))`.
        outer_lr: > 0; default 0.7, the paper's choice.
        outer_momentum: in [0, 1); default 0.9, the paper's choice.
        outer_nesterov: Nesterov's form of it; default True, the paper's choice.
        delay: local steps from launch to merge, in [0, tau]; default 0. Above 0 only with carry or
            a local weight.
        carry: keep the local steps made between launch and merge; default False.
        local_weight: of the local value at the merge, in [0, 1); default 0. Above 0 instead of
            `carry`.
        gmf: another name of `outer_momentum`, from the original code.

    Raises:
        ValueError: a value outside its range; a delay with neither; settings of the SGD beside
            `outer`.

    Source: Douillard et al. 2023 (arXiv 2311.08105), algorithm 1.
    """

    def __init__(
        self,
        params: Params,
        *,
        tau: Tau,
        outer: OuterFactory | None = None,
        outer_lr: float | None = None,
        outer_momentum: float | None = None,
        outer_nesterov: bool | None = None,
        delay: int | None = 0,
        carry: bool = False,
        local_weight: float = 0.0,
        gmf: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        local_weight = checks.number("local_weight", local_weight, 0, 1, open_high=True)
        step = outer_step(outer, outer_lr, outer_momentum, gmf, outer_nesterov, lr=0.7)
        if local_weight and checks.flag("carry", carry):
            raise ValueError(
                f"local_weight={local_weight} with carry=True: two ways to keep the local steps; "
                "give one"
            )

        def rule(_: int) -> Rule:
            if local_weight:
                return Pull(step, 1 - local_weight)
            return adopting(step, delay=delay, carry=carry)

        super().__init__(params, rule=rule, tau=tau, delay=delay, **options)


def outer_step(
    outer: OuterFactory | None,
    outer_lr: float | None,
    outer_momentum: float | None,
    gmf: float | None,
    nesterov: bool | None,
    *,
    lr: float,
) -> OuterStep:
    """The outer step of the DiLoCo family: any outer optimizer, or Nesterov SGD with this default lr.

    Raises:
        ValueError: a value outside its range, or one of the SGD's beside `outer`.
    """
    if outer is not None:
        given = {
            "outer_lr": outer_lr,
            "outer_momentum": outer_momentum,
            "gmf": gmf,
            "outer_nesterov": nesterov,
        }
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{name}={value!r} with outer: belongs to the outer optimizer that was given; "
                    "set it there"
                )
        return OuterOptimizer(outer)
    return nesterov_sgd(outer_lr, outer_momentum, gmf, nesterov, lr=lr)


def nesterov_sgd(
    outer_lr: float | None,
    outer_momentum: float | None,
    gmf: float | None,
    nesterov: bool | None,
    *,
    lr: float,
) -> OuterSGD:
    """The outer SGD of the DiLoCo family: Nesterov's, momentum 0.9, this default learning rate.

    Raises:
        ValueError: a value outside its range.
    """
    if outer_lr is not None:
        lr = checks.number("outer_lr", outer_lr, 0, checks.LARGEST, open_low=True)
    momentum = checks.outer_momentum(outer_momentum, gmf, default=0.9)
    uses_nesterov = nesterov is None or checks.flag("outer_nesterov", nesterov)
    return OuterSGD(lr, momentum, nesterov=uses_nesterov and momentum > 0)
