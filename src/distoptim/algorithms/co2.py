"""CO2: slow momentum with a whole round hidden, a penalty for staleness and a bound on the momentum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import Unpack

from distoptim import checks
from distoptim.algorithms.carry import Carried
from distoptim.algorithms.late import Late
from distoptim.algorithms.rule import Mean
from distoptim.algorithms.rules import Anchored
from distoptim.fragments import Flat, Fragment
from distoptim.optimizer import AveragingOptimizer
from distoptim.options import Options, Params
from distoptim.period import Tau


@dataclass
class Gap(Carried):
    """The same, with the momentum; how far the anchor moved last, and the farthest it ever did (Euclidean)."""

    momentum: Flat | None = None
    moved: float = 0.0
    farthest: float = 0.0


@dataclass(frozen=True)
class Penalised(Late):
    """The late anchor takes m <- clip(beta m + (z - mean)/gap); z <- z - outer_lr m, each element of m in +-clip."""

    clip: float = 1.0

    def start(self, fragment: Fragment) -> Gap:
        """The start as anchor and base, momentum 0."""
        state = super().start(fragment)
        return Gap(state.anchor, None, None, state.base, fragment.flat())

    def move(self, fragment: Fragment, state: Anchored, mean: Mean) -> None:
        """z <- z - outer_lr clip(m); overwrites the mean."""
        assert isinstance(state, Gap)
        assert state.momentum is not None
        gap = 1 + state.moved / state.farthest if state.farthest else 1.0
        m, g = state.momentum.tensor, mean.flat.tensor[: fragment.numel]
        torch.sub(state.anchor.tensor, g, out=g)
        m.mul_(self.outer_momentum).add_(g, alpha=1 / gap).clamp_(-self.clip, self.clip)
        state.anchor.tensor.sub_(m, alpha=self.outer_lr)
        state.moved = self.outer_lr * float(m.norm())
        state.farthest = max(state.farthest, state.moved)


class CO2(AveragingOptimizer):
    """CO2: every `tau` local steps all restart from an anchor that knows the mean of one round ago.

    m <- clip(outer_momentum m + (z - mean)/gap, -clip, clip); z <- z - outer_lr m; x <- z, after x was sent.
    gap = 1 + |last move of z| / |farthest move of z so far|, in [1, 2]: what is stale because z has moved on counts
    less. That the gap divides the new pseudo-gradient is from the authors' code; the gap is ours, after Gap-Aware
    (arXiv 1909.10802), and bit-equal on all workers. docs/algorithms.md says what of the paper is not verified.

    Args:
        params: parameters, param groups or a torch optimizer (`AveragingOptimizer`, also for `options`).
        tau: local steps in a round, >= 1, or a period object.
        outer_lr: > 0; default 1, that of the authors' code.
        outer_momentum: in [0, 1); default 0.2, that of the authors' example, and of their code for 17 to 32 workers.
        clip: bound of each element of the momentum, in units of the parameters, > 0; default 1, as there.
        delay: local steps from launch to merge, in [0, tau]; default tau, which hides the most.
        gmf: another name of `outer_momentum`, from the original code.

    Raises:
        ValueError: a value outside its range.

    Source: Sun et al. 2024 (arXiv 2401.16265), but for the gap.
    """

    def __init__(self, params: Params, *, tau: Tau, outer_lr: float = 1.0, outer_momentum: float | None = None,
                 clip: float = 1.0, delay: int | None = None, gmf: float | None = None,
                 **options: Unpack[Options]) -> None:
        momentum = checks.outer_momentum(outer_momentum, gmf, default=0.2)
        outer_lr = checks.number("outer_lr", outer_lr, 0, checks.LARGEST, open_low=True)
        clip = checks.number("clip", clip, 0, checks.LARGEST, open_low=True)
        when: Tau = tau if delay is None else checks.integer("delay", delay, 0)
        super().__init__(params, rule=Penalised(1.0, outer_lr, momentum, rescale=False, clip=clip), tau=tau,
                         delay=when, **options)
