"""BMUF with a whole round hidden: the workers' mean moves as if nothing came late."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch

from distoptim import checks
from distoptim.algorithms.anchor import (
    Carried,
    shared_fields,
    start_anchor,
    start_base,
)
from distoptim.fragments import Flat, Fragment
from distoptim.optimizer import AveragingOptimizer
from distoptim.periods import Tau
from distoptim.rule import Mean, Rule, State
from distoptim.settings import Options, Params

if TYPE_CHECKING:
    from typing_extensions import Unpack


@final
@dataclass(frozen=True)
class Correct(Rule):
    """x <- x + gain (mean - sent) + momentum (mean - z); z <- mean.

    Until the mean is there z stays, so both are one step from a mix of what was sent and z:
    x <- x + (gain + momentum) (mean - mix), mix = (gain sent + momentum z)/(gain + momentum). The mix is
    the state's base.
    """

    gain: float
    momentum: float

    def start(self, fragment: Fragment) -> State:
        """The start as z, and as the mix."""
        anchor = start_anchor(fragment)
        return Carried(anchor, base=start_base(anchor, fragment))

    def sent(self, fragment: Fragment, state: State, sent: Flat) -> None:
        """mix <- (gain sent + momentum z)/(gain + momentum); z where what was sent is not finite."""
        assert isinstance(state, Carried)
        # The last element, 0 or 1, says whether it is finite.
        weight = sent.tensor[-1] * (self.gain / (self.gain + self.momentum))
        payload = sent.tensor[: fragment.numel]
        torch.lerp(state.anchor.tensor, payload, weight, out=state.base.tensor)

    def merge(self, fragment: Fragment, state: State, mean: Mean) -> None:
        """x <- x + (gain + momentum) (mean - mix), in place of the mix; z <- mean."""
        assert isinstance(state, Carried)
        mix = state.base
        state.anchor.tensor.copy_(mean.flat.tensor[: fragment.numel])
        torch.sub(state.anchor.tensor, mix.tensor, out=mix.tensor)
        fragment.add(mix, weight=self.gain + self.momentum)

    def shared(self, state: State) -> Mapping[str, Any]:
        """z, but not the mix."""
        return shared_fields(state)


@final
class OverlapBMUF(AveragingOptimizer):
    """Overlapped BMUF: a worker is corrected by a part of its distance to the mean of one round
    ago, all by its motion.

    x <- x + gain (mean - sent) + block_momentum (mean - mean before), merged tau local steps after
    the launch. Corrections cancel in the workers' mean, and the momentum needs only means that are
    old anyway: so the workers' mean moves as under blocking BMUF, none the later (derivation:
    docs/hidden-momentum.md).

    Args:
        params: parameters, param groups or a torch optimizer (`AveragingOptimizer`, also for
            `options`).
        tau: local steps in a round, >= 1, or a period object.
        block_momentum: in [0, 1); default 0.5, the best in results/beyond. It multiplies the
            effective learning rate by 1/(1 - block_momentum): divide lr by as much.
        gain: of the correction, in (0, 1]; default 0.5, which contracts differences between workers
            in stiff and in flat directions alike. 1 is best in flat ones and swings in stiff ones;
            without momentum it is CoCoD-SGD.
        delay: local steps from launch to merge, in [0, tau]; default tau, which hides the most. 0
            with gain = 1 is Nesterov's BMUF.
        gmf: another name of `block_momentum`, from the original code.

    Raises:
        ValueError: a value outside its range.

    Source: ours. The momentum is that of Chen & Huo, ICASSP 2016; gain = 1 that of Shen et al. 2019
        (arXiv 1906.12043).
    """

    def __init__(
        self,
        params: Params,
        *,
        tau: Tau,
        block_momentum: float | None = None,
        gain: float = 0.5,
        delay: int | None = None,
        gmf: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        momentum = checks.outer_momentum(block_momentum, gmf, default=0.5, name="block_momentum")
        gain = checks.number("gain", gain, 0, 1, open_low=True)
        super().__init__(params, rule=Correct(gain, momentum), tau=tau, delay=delay, **options)
