"""DiLoCo: an outer optimizer on the anchor, and any inner optimizer on the workers."""

from __future__ import annotations

from typing_extensions import Unpack

from distoptim import checks
from distoptim.algorithms.carry import adopting
from distoptim.algorithms.outer import Factory, Outer
from distoptim.algorithms.rules import Pull
from distoptim.optimizer import AveragingOptimizer
from distoptim.options import Options, Params
from distoptim.periods import Tau


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
        outer: Factory | None = None,
        outer_lr: float | None = None,
        outer_momentum: float | None = None,
        outer_nesterov: bool | None = None,
        delay: int = 0,
        carry: bool = False,
        local_weight: float = 0.0,
        gmf: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        local_weight = checks.number("local_weight", local_weight, 0, 1, open_high=True)
        rule = outer_rule(
            outer, outer_lr, outer_momentum, gmf, outer_nesterov, lr=0.7, alpha=1 - local_weight
        )
        if local_weight and checks.flag("carry", carry):
            raise ValueError(
                f"local_weight={local_weight} with carry=True: two ways to keep the local steps; give one"
            )
        if not local_weight:
            rule = adopting(rule, delay=delay, carry=carry)
        super().__init__(params, rule=rule, tau=tau, delay=delay, **options)


def outer_rule(
    outer: Factory | None,
    outer_lr: float | None,
    outer_momentum: float | None,
    gmf: float | None,
    nesterov: bool | None,
    *,
    lr: float,
    alpha: float,
) -> Pull:
    """The pull of the DiLoCo family: any outer optimizer, or Nesterov SGD with this default
    learning rate.

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
                    f"{name}={value!r} with outer: belongs to the outer optimizer that was given; set it "
                    "there"
                )
        return Pull(alpha, 1.0, 0.0, rescale=False, outer=Outer(outer))
    lr = (
        lr
        if outer_lr is None
        else checks.number("outer_lr", outer_lr, 0, checks.LARGEST, open_low=True)
    )
    momentum = checks.outer_momentum(outer_momentum, gmf, default=0.9)
    nesterov = nesterov is None or checks.flag("outer_nesterov", nesterov)
    return Pull(alpha, lr, momentum, nesterov=nesterov and momentum > 0, rescale=False)
