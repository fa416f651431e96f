"""Eager DiLoCo: a whole round hidden, with the worker's own share of it at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from distoptim import checks
from distoptim.algorithms.anchor import (
    BaseState,
    Carried,
    OuterSGD,
    carry_over,
    shared_fields,
    start_base,
)
from distoptim.algorithms.diloco import nesterov_sgd
from distoptim.chunks import chunked
from distoptim.fragments import Flat, Fragment
from distoptim.optimizer import AveragingOptimizer
from distoptim.periods import Tau
from distoptim.rule import Mean, Rule, State
from distoptim.settings import Options, Params

if TYPE_CHECKING:
    from typing_extensions import Unpack


@final
@dataclass(kw_only=True)
class Eager(BaseState):
    """And the momentum of the worker's own pseudo-gradients."""

    own: Flat


@final
@dataclass(frozen=True)
class Restart(Rule):
    """Every round restarts from the anchor known at its launch; its steps come back in the next mean.

    At the launch, with g = z - sent, this round's own pseudo-gradient:
    x <- z - share * (outer step of the worker's own g, with its own momentum).
    At the merge z <- outer step and x <- z + (x - base), base being where the round restarted.

    Shared anchor and outer momentum see exact means only, so they are bit-equal on all workers; what
    a worker adds of its own never enters them.

    Args:
        outer: moves the anchor.
        share: of the worker's own fresh pseudo-gradient, in [0, 1]; 0 for the anchor alone, 1/m for
            Eager DiLoCo.
    """

    outer: OuterSGD
    share: float

    def start(self, fragment: Fragment) -> State:
        """The start as anchor and base, own momentum 0."""
        anchor, outer = self.outer.start(fragment)
        base = start_base(anchor, fragment)
        if not self.share:
            return Carried(anchor, outer, base=base)
        return Eager(anchor, outer, base=base, own=fragment.flat())

    def sent(self, fragment: Fragment, state: State, sent: Flat) -> None:
        """x <- z - share (outer step of the worker's own g)."""
        assert isinstance(state, BaseState)
        base = state.base
        if isinstance(state, Eager):
            payload = sent.tensor[: fragment.numel]
            self._own_step(
                state.anchor.tensor, payload, state.own.tensor, base.tensor, sent.tensor[-1]
            )
        else:
            base.tensor.copy_(state.anchor.tensor)
        fragment.write(base)

    def _own_step(
        self, anchor: Tensor, sent: Tensor, own: Tensor, base: Tensor, weight: Tensor
    ) -> None:
        """u <- beta u + g; base <- z - share lr (g + beta u), or classic: z - share lr u."""
        beta = self.outer.momentum
        # The weight, 0 or 1, keeps a payload that was not finite out of the momentum; only on the CPU
        # it can be read without waiting.
        finite = weight.device.type == "cpu" and weight == 1
        for z, x, u, g in chunked(anchor, sent, own, base):
            torch.sub(z, x, out=g)
            if not finite:
                g.mul_(weight)
            torch.add(g, u, alpha=beta, out=u)
            step = g.add_(u, alpha=beta) if self.outer.nesterov else u
            torch.sub(z, step, alpha=self.share * self.outer.lr, out=g)

    def merge(self, fragment: Fragment, state: State, mean: Mean) -> None:
        """z <- outer step; x <- z + (x - base)."""
        assert isinstance(state, BaseState)
        self.outer.step(fragment, state, mean)
        carry_over(fragment, state)

    def abandoned(self, fragment: Fragment, state: State, sent: Flat | None) -> None:
        """x <- sent + (x - base), and the own momentum as before: u <- (u - g)/beta."""
        assert isinstance(state, BaseState)
        if sent is None:
            return
        payload = sent.tensor[: fragment.numel]
        beta = self.outer.momentum
        if isinstance(state, Eager) and beta:
            # Weighted as at the launch, where one that was not finite did not count.
            own = state.own.tensor
            own.sub_((state.anchor.tensor - payload).mul_(sent.tensor[-1])).div_(beta)
        payload.sub_(state.base.tensor)
        fragment.add(sent)

    def shared(self, state: State) -> Mapping[str, Any]:
        """Anchor and outer state, neither the base nor the own momentum."""
        return shared_fields(state)

    def fallback(self, state: State) -> Flat | None:
        """Where it restarted last: a merge makes the anchor of that.

        After the merge, anything would do: a launch follows.
        """
        assert isinstance(state, BaseState)
        return state.base


@final
class EagerDiLoCo(AveragingOptimizer):
    """Eager DiLoCo: the mean pseudo-gradient comes a round late; the worker's own part of it is
    used at once.

    The paper's step on g~ = mean g(stale) + (g_i(fresh) - g_i(stale))/m differs between workers,
    and so would the outer state. Nesterov SGD is linear, so the differences add up to one step on
    the worker's own part: z <- OuterSGD(z, mean g(stale)), bit-equal on all workers; u <- beta u +
    g_i(fresh); x <- z - outer_lr/m (g_i(fresh) + beta u). The same numbers, and a shared anchor.

    Args:
        params: parameters, param groups or a torch optimizer (`AveragingOptimizer`, also for
            `options`).
        tau: local steps in a round, >= 1, or a period object.
        outer_lr: > 0; default 0.4, the paper's choice.
        outer_momentum: beta, in [0, 1); default 0.9, the paper's choice.
        outer_nesterov: Nesterov's form of it; default True, the paper's choice. Classic: x <- z -
            outer_lr/m u.
        delay: local steps from launch to merge, in [0, tau]; default tau, which hides the most.
        eager: use the own part; default True. False restarts from the late anchor alone: the
            paper's "delayed outer gradients", which it found to be worse, though less so with a
            smaller outer_lr.
        gmf: another name of `outer_momentum`, from the original code.

    Raises:
        ValueError: a value outside its range.

    Source: Kale, Douillard, Donchev 2025 (arXiv 2502.12996), algorithm 3; without `eager` algorithm
        2.
    """

    def __init__(
        self,
        params: Params,
        *,
        tau: Tau,
        outer_lr: float | None = None,
        outer_momentum: float | None = None,
        outer_nesterov: bool | None = None,
        delay: int | None = None,
        eager: bool = True,
        gmf: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        outer = nesterov_sgd(outer_lr, outer_momentum, gmf, outer_nesterov, lr=0.4)
        checks.flag("eager", eager)
        super().__init__(
            params,
            rule=lambda workers: Restart(outer, share=1 / workers if eager else 0.0),
            tau=tau,
            delay=delay,
            **options,
        )
