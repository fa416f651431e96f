"""Streaming DiLoCo: fragment after fragment, each a little late."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from distoptim import checks
from distoptim.algorithms.anchor import OuterFactory, Pull
from distoptim.algorithms.diloco import outer_step
from distoptim.optimizer import AveragingOptimizer
from distoptim.periods import Tau
from distoptim.settings import Options, Params

if TYPE_CHECKING:
    from typing_extensions import Unpack


@final
class StreamingDiLoCo(AveragingOptimizer):
    """Streaming DiLoCo: fragments are averaged one after another, spread over the round, hidden
    behind a few steps.

    Of each fragment, every `tau` local steps, `delay` of them after the launch:
    z <- OuterOpt(z, z - mean); x <- local_weight x + (1 - local_weight) z. Each has its own outer
    state. z is one anchor for all workers, where the paper writes each worker's own x at its
    previous launch.

    Args:
        params: parameters, param groups or a torch optimizer (`AveragingOptimizer`, also for
            `options`).
        tau: local steps between two means of the same fragment, >= 1 (the paper's H). Of n
            fragments, number k is launched at steps t_k, t_k + tau, ... with t_k = floor(k tau /
            n), t_0 = tau: where n does not divide tau the gaps between launches differ by one step,
            the period of each fragment stays exactly tau.
        outer: list of anchor tensors -> torch optimizer that moves them; default SGD with the three
            that follow.
        outer_lr: > 0; default 0.4, the paper's choice.
        outer_momentum: in [0, 1); default 0.9, the paper's choice.
        outer_nesterov: Nesterov's form of it; default True, the paper's choice.
        delay: local steps from launch to merge, in [0, tau] (the paper's tau); default 1. The paper
            advises up to 5. Above the distance of the launches several fragments are in flight.
        local_weight: of the local value at the merge, in [0, 1) (the paper's alpha); default 0.5,
            the plain average of both. 0 adopts the anchor, with delay 0 only.
        gmf: another name of `outer_momentum`, from the original code.

    Raises:
        ValueError: a value outside its range; local_weight 0 with a delay, which throws local steps
            away.

    Source: Douillard et al. 2025 (arXiv 2501.18512), algorithm 2. The fragments: `fragments` and
        `pattern`.
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
        delay: int | None = 1,
        local_weight: float = 0.5,
        gmf: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        local_weight = checks.number("local_weight", local_weight, 0, 1, open_high=True)
        if not local_weight and not checks.is_zero(delay):
            raise ValueError(
                f"local_weight=0 with delay={delay}: the local steps made meanwhile would be "
                "thrown away; allowed is a local_weight above 0, delay=0, or DiLoCo(carry=True)"
            )
        step = outer_step(outer, outer_lr, outer_momentum, gmf, outer_nesterov, lr=0.4)
        super().__init__(params, rule=Pull(step, 1 - local_weight), tau=tau, delay=delay, **options)
