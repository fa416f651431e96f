"""A mean at every step, in few bits, one step late: the workers' mean moves by heavy-ball momentum."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch

from distoptim import checks
from distoptim.algorithms.anchor import Anchored, AnchorState, Carried, shared_fields, start_anchor
from distoptim.algorithms.moved_momentum import MovedMomentum, moved_momentum
from distoptim.comm.codecs import Codec, Coding, ResidualInParameters
from distoptim.comm.codecs import find as find_codec
from distoptim.fragments import Flat, Fragment
from distoptim.optimizer import AveragingOptimizer
from distoptim.periods import Tau
from distoptim.rule import Mean, Rule, State
from distoptim.settings import Options, Params, SyncSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger("distoptim")

_DEFAULT_CODEC = "e3m0"
_CODABLE = (torch.float32, torch.bfloat16, torch.float16, torch.complex64)
_OF_SGD = ("lr", "momentum", "dampening", "weight_decay", "nesterov")
# Local steps after which the link is looked at, and the share of them that may be spent waiting.
_LOOK_AT = 64
_MAY_WAIT = 0.25


@final
@dataclass(frozen=True)
class HeavyBall(Rule):
    """x <- x + gain (mean - sent) + momentum (lr/lr before) (mean - z); z <- mean.

    With a codec, "sent" is what others read of this worker's code, so what the code has lost stays in x.

    Args:
        gain: of the correction, in (0, 1].
        momentum: of each param group, now.
        coded: whether means come through a codec, which then remembers what was sent.
    """

    gain: float
    momentum: MovedMomentum
    coded: bool

    @property
    def follows_lr(self) -> bool:
        """By the ratio of two."""
        return True

    def start(self, fragment: Fragment) -> State:
        """The start as z; what was sent less z is 0."""
        anchor = start_anchor(fragment)
        return Anchored(anchor) if self.coded else Carried(anchor, base=fragment.flat())

    def sent(self, fragment: Fragment, state: State, sent: Flat) -> None:
        """Remember sent - z; 0 where what was sent is not finite."""
        if self.coded or not isinstance(state, Carried):
            return
        base = state.base.tensor
        torch.sub(sent.tensor[: fragment.numel], state.anchor.tensor, out=base)
        # The last element, 0 or 1, says whether it is finite.
        base.mul_(sent.tensor[-1])

    def merge(self, fragment: Fragment, state: State, mean: Mean) -> None:
        """x <- x + (gain + momentum) (mean - z) - gain (sent - z), in place of the mean."""
        assert isinstance(state, AnchorState)
        moved = mean.flat.tensor[: fragment.numel].sub_(state.anchor.tensor)
        # By what it has moved, since the mean itself is overwritten: z <- mean.
        state.anchor.tensor.add_(moved)
        for i, (group, part) in enumerate(fragment.segments):
            moved[part].mul_(self.gain + self.momentum.of(group) * _ratio(state, mean, i))
        state.lr = list(mean.lr)
        if mean.coded is not None:
            mean.coded.add_sent(moved, -self.gain)
        else:
            assert isinstance(state, Carried)
            moved.sub_(state.base.tensor, alpha=self.gain)
        fragment.add(mean.flat)

    def shared(self, state: State) -> Mapping[str, Any]:
        """z, but not what was sent."""
        return shared_fields(state)


def _ratio(state: AnchorState, mean: Mean, segment: int) -> float:
    """By what a learning rate has changed since the movement before; a movement at 0 is none."""
    if state.lr is None:
        return 1.0
    before = state.lr[segment]
    return mean.lr[segment] / before if before else 0.0


@final
class GlobalMomentum(AveragingOptimizer):
    """Every-step averaging with global momentum: a mean at each local step, in 4 bits and one step late,
    and the inner optimizer's momentum in that mean instead of in the workers.

    x <- x + gain (mean - sent) + momentum (mean - mean before). The momentum, of SGD(momentum=0.9) or
    AdamW(betas=(0.9, 0.999)), is moved out of the optimizer that is handed over: its steps are made
    with 0, at the learning rate that leaves the effective one alone (lr; for Adam and its like
    (1 - beta1) lr), and the workers' mean moves as under one optimizer with this momentum and all
    workers' gradients. `param_groups` show what you gave: schedulers write learning rates and cycle
    momenta as ever. Derivation: docs/every-step.md.

    Args:
        params: parameters, param groups or a torch optimizer (`AveragingOptimizer`, also for
            `options`). Momentum is moved out of SGD, RMSprop, Adam, AdamW, Adamax and RAdam.
        tau: local steps in a round, >= 1, or a period object; default 1. More only where a mean takes
            longer than a step: then as many as it takes. In `PostLocal`'s synchronous phase momentum
            is the workers' own; the mean's begins at 0 after it.
        gain: of the correction, in (0, 1]; default 0.7, from trials at 4 bits. Differences between
            workers shrink to (1 - gain) a round in flat directions; 1 swings in stiff ones.
        delay: local steps from launch to merge, in [0, tau]; default tau. 0 with gain = 1 and no codec
            is synchronous SGD(momentum, nesterov=True).
        momentum_key: where an inner optimizer that is not named above has its momentum in its param
            groups: a number is a sum's (SGD), the first of a pair that of an average (Adam).
        global_momentum: the mean's momentum, in [0, 1), for an inner optimizer without one.
        gmf: another name of `global_momentum`, from the original code.

    Among the options, `codec` is "e3m0" unless given (4 bits; float32 on the CPU), or None (float32)
    where that cannot be: on GPUs and in float64. "+ef" adds nothing: what a worker's code loses stays
    in its parameters, and what codes of means lose is always kept. Memory: 2 copies of the model and
    0.4 of codes with it, 3 without.

    Raises:
        ValueError: a value outside its range, two momenta, or an optimizer that has made steps with
            momentum.

    Source: ours. Momentum of the mean instead of the workers: Zhao et al. 2019 (arXiv 1905.12948);
        residuals in x: Koloskova et al. 2019 (arXiv 1902.00340).
    """

    _rule: HeavyBall

    def __init__(
        self,
        params: Params,
        *,
        tau: Tau = 1,
        gain: float = 0.7,
        delay: int | None = None,
        momentum_key: str | None = None,
        global_momentum: float | None = None,
        gmf: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        gain = checks.number("gain", gain, 0, 1, open_low=True)
        given = checks.outer_momentum(
            global_momentum, gmf, default=math.nan, name="global_momentum"
        )
        settings = SyncSettings(tau=tau, delay=delay, **options)
        inner = settings.inner_optimizer(params)
        momentum = moved_momentum(
            inner, key=momentum_key, given=None if math.isnan(given) else given
        )
        coding = _coding(settings, inner, chosen="codec" not in options)
        for name in _OF_SGD:
            options.pop(name, None)  # type: ignore[misc]  # each is a key
        options["codec"] = coding
        rule = HeavyBall(gain, momentum, coding is not None)
        super().__init__(inner, rule=rule, tau=tau, delay=delay, **options)
        logger.info("%s", self.moved)

    @property
    def moved(self) -> str:
        """What was done to the optimizer that was handed over, and what was chosen, in one line."""
        momentum = self._rule.momentum
        kind = type(self.inner).__name__
        groups = range(len(self.inner.param_groups))
        betas = ", ".join(dict.fromkeys(f"{momentum.of(i):g}" for i in groups))
        factors = ", ".join(dict.fromkeys(f"{momentum.factor(i):g}" for i in groups))
        what = (
            f"momentum {betas} of the workers' mean beside {kind}'s own, which is kept"
            if momentum.key is None
            else f"{kind}'s momentum {betas} is moved into the workers' mean, its steps are made without, "
            f"at {factors} times the learning rate"
        )
        coding = self._settings.coding
        codec = "float32" if coding is None else repr(coding.codec)  # type: ignore[union-attr]
        nbytes = sum(sync.nbytes for sync in self.engine.syncs)
        return f"{what}; means in {codec}, {nbytes / 1e6:.3g} MB each; gain {self._rule.gain:g}"

    def _local_step(self, closure: Callable[[], Any] | None) -> Any:
        """Without momentum; with it where workers hold one model, in the first phase of `PostLocal`."""
        if self.engine.step == _LOOK_AT:
            self._look_at_link()
        if self.engine.clock.synchronous:
            return super()._local_step(closure)
        with self._rule.momentum.away():
            return super()._local_step(closure)

    def _look_at_link(self) -> None:
        """Warn where means take longer than the local steps that hide them."""
        found = self.stats()
        share = found["exposed_share"]
        if share <= _MAY_WAIT:
            return
        # From the first average() to the last.
        step_s = found["computation_s"] / (found["steps"] - 1)
        mean_s = max(sync.seconds for sync in self.engine.syncs)
        hiding = max(2, math.ceil(0.99 * mean_s / step_s))
        warnings.warn(
            f"means take {1e3 * mean_s:.3g} ms and local steps {1e3 * step_s:.3g} ms: this worker waits "
            f"{share:.0%} of its computation; tau={hiding} hides them; where the link is narrow rather "
            'than far, fewer bits do too (codec="2bit")',
            RuntimeWarning,
            stacklevel=4,
        )

    def _check_plain(self, state: Mapping[str, Any]) -> None:
        """Its momentum would be lost."""
        self._rule.momentum.check_state(state["state"])


def _coding(settings: SyncSettings, inner: torch.optim.Optimizer, *, chosen: bool) -> Coding | None:
    """In which means travel: 4 bits where that can be and nothing else is said."""
    coding = settings.coding
    if chosen:
        coding = find_codec(_DEFAULT_CODEC) if _codable(settings, inner) else None
    if coding is None or isinstance(coding, ResidualInParameters):
        return coding
    return ResidualInParameters(coding if isinstance(coding, Codec) else coding.codec)


def _codable(settings: SyncSettings, inner: torch.optim.Optimizer) -> bool:
    params = [p for group in inner.param_groups for p in group["params"] if p.requires_grad]
    return getattr(settings.communicator, "carries_codes", True) and all(
        p.device.type == "cpu" and p.dtype in _CODABLE for p in params
    )
