"""CO2.

Slow momentum with a whole round hidden, a penalty for staleness and a bound on the momentum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from distoptim import checks
from distoptim.algorithms.anchor import AnchorState, start_anchor
from distoptim.chunks import CHUNK, chunked
from distoptim.fragments import Flat, Fragment
from distoptim.optimizer import AveragingOptimizer
from distoptim.periods import Tau
from distoptim.rule import Mean, Rule, State
from distoptim.settings import Options, Params

if TYPE_CHECKING:
    from typing_extensions import Unpack


@final
@dataclass(kw_only=True)
class Gap(AnchorState):
    """And the anchor's momentum; how far it moved last, and the farthest ever (Euclidean)."""

    momentum: Flat
    moved: float = 0.0
    farthest: float = 0.0


@final
@dataclass(frozen=True)
class Penalised(Rule):
    """An anchor whose momentum takes late news divided by a gap, and is bounded element by element.

    At the launch x <- z; at the merge m <- clip(beta m + (z - mean)/gap), and z and x both move by
    -outer_lr m.
    """

    outer_lr: float
    outer_momentum: float
    clip: float

    def start(self, fragment: Fragment) -> State:
        """The start as anchor, momentum 0."""
        return Gap(start_anchor(fragment), momentum=fragment.flat())

    def sent(self, fragment: Fragment, state: State, sent: Flat) -> None:
        """x <- z; what the round before has added comes back in the mean."""
        assert isinstance(state, Gap)
        fragment.write(state.anchor)

    def merge(self, fragment: Fragment, state: State, mean: Mean) -> None:
        """m <- clip(beta m + (z - mean)/gap); z <- z - outer_lr m; x <- x - outer_lr m."""
        assert isinstance(state, Gap)
        gap = 1 + state.moved / state.farthest if state.farthest else 1.0
        norms: list[Tensor] = []
        payload = mean.flat.tensor[: fragment.numel]
        for z, m, g in chunked(state.anchor.tensor, state.momentum.tensor, payload):
            torch.sub(z, g, out=g)
            m.mul_(self.outer_momentum).add_(g, alpha=1 / gap).clamp_(-self.clip, self.clip)
            z.sub_(m, alpha=self.outer_lr)
            # Chunks depend on a rank's threads; how the sum behind the gap is rounded must not.
            norms += torch._foreach_norm(torch.split(m, CHUNK))
        fragment.add(state.momentum, weight=-self.outer_lr)
        state.moved = self.outer_lr * float(torch.stack(norms).norm())
        state.farthest = max(state.farthest, state.moved)

    def abandoned(self, fragment: Fragment, state: State, sent: Flat | None) -> None:
        """x <- sent + (x - z): the steps that no mean will bring back."""
        assert isinstance(state, Gap)
        if sent is not None:
            sent.tensor[: fragment.numel].sub_(state.anchor.tensor)
            fragment.add(sent)

    def shared(self, state: State) -> Mapping[str, Any]:
        """Anchor and momentum: all of the state."""
        return vars(state)


@final
class CO2(AveragingOptimizer):
    """CO2: every `tau` local steps all restart from an anchor that knows the mean of one round ago.

    m <- clip(outer_momentum m + (z - mean)/gap, -clip, clip); z <- z - outer_lr m; x <- z, after x
    was sent. gap = 1 + |last move of z| / |farthest move of z so far|, in [1, 2]: what is stale
    because z has moved on counts less. That the gap divides the new pseudo-gradient is from the
    authors' code; the gap is ours, after Gap-Aware (arXiv 1909.10802), and bit-equal on all
    workers. docs/algorithms.md says what of the paper is not verified.

    Args:
        params: parameters, param groups or a torch optimizer (`AveragingOptimizer`, also for
            `options`).
        tau: local steps in a round, >= 1, or a period object.
        outer_lr: > 0; default 1, that of the authors' code.
        outer_momentum: in [0, 1); default 0.2, that of the authors' example, and of their code for
            17 to 32 workers.
        clip: bound of each element of the momentum, in units of the parameters, > 0; default 1, as
            there.
        delay: local steps from launch to merge, in [0, tau]; default tau, which hides the most.
        gmf: another name of `outer_momentum`, from the original code.

    Raises:
        ValueError: a value outside its range.

    Source: Sun et al. 2024 (arXiv 2401.16265), but for the gap.
    """

    def __init__(
        self,
        params: Params,
        *,
        tau: Tau,
        outer_lr: float = 1.0,
        outer_momentum: float | None = None,
        clip: float = 1.0,
        delay: int | None = None,
        gmf: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        momentum = checks.outer_momentum(outer_momentum, gmf, default=0.2)
        outer_lr = checks.number("outer_lr", outer_lr, 0, checks.LARGEST, open_low=True)
        clip = checks.number("clip", clip, 0, checks.LARGEST, open_low=True)
        rule = Penalised(outer_lr, momentum, clip)
        super().__init__(params, rule=rule, tau=tau, delay=delay, **options)
