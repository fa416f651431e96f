"""tau: how long a round is, fixed or chosen while training."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from distoptim import checks

Change = tuple[int, str]

WEIGHTS = ("steps", "workers")
"""What a payload of `EqualTime` may weigh."""


class Period(ABC):
    """Says how many local steps the next round has; asked where a round ends, before the next
    launch.

    Subclasses are frozen dataclasses, on which all workers must agree. What they decide must follow
    from what is equal on all workers: the local step and the means.

    Attributes:
        measures: what each worker sends along, so that its mean over the workers can be decided on:
            of "loss", "lr", "step_s" (computing a local step), "communication_s" (all means of a
            round) and "steps" (local steps in the round).
        start: local step until which the workers average after every local step.
        remembers: the numbers that it keeps in memory, from 0 on, all of them or none; empty: any it likes.
        round_s: seconds of computation in a round, in which each worker makes as many local steps as
            it can; None: rounds are of tau local steps, on all workers.
        weigh: what a payload of a round of `round_s` weighs (see `EqualTime`).
    """

    measures: tuple[str, ...] = ()
    start: int = 0
    remembers: tuple[str, ...] = ()
    round_s: float | None = None
    weigh: str = "steps"

    @property
    @abstractmethod
    def smallest(self) -> int:
        """The smallest tau it will choose."""

    @property
    def first(self) -> int:
        """The tau it begins with."""
        return self.smallest

    @property
    def first_timed(self) -> int | None:
        """The tau it begins with where the link was measured before the first round.

        Long enough to time a local step that is not the first one: then it chooses, from that and from
        the link. None: it does not ask how long means take.
        """
        return None

    @property
    def choices(self) -> frozenset[int] | None:
        """Every tau it can choose, if that is known before."""
        return None

    def choose(
        self, step: int, tau: int, means: Mapping[str, float], memory: dict[str, float]
    ) -> Change:
        """The next round's tau and the reason.

        Args:
            step: local steps done.
            tau: of the round that ends.
            means: the workers' means of `measures`, as sent at the start of the round merged last;
                or empty.
            memory: numbers that it wants to remember; part of the checkpoint.
        """
        return tau, "fixed"


Tau = int | Period | Mapping[int, int]


@dataclass(frozen=True)
class Fixed(Period):
    """Always the same tau, >= 1."""

    tau: int

    def __post_init__(self) -> None:
        """Check the range."""
        checks.integer("tau", self.tau, 1)

    @property
    def smallest(self) -> int:
        """The only tau there is."""
        return self.tau

    @property
    def choices(self) -> frozenset[int]:
        """The only tau there is."""
        return frozenset([self.tau])


def period_of(tau: object) -> Period:
    """A period object as it is, a mapping of local steps to taus as a schedule, an integer as a
    fixed one.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(tau, Period):
        return tau
    if isinstance(tau, Mapping):
        return Schedule(tau)
    return Fixed(checks.integer("tau", tau, 1))


def level_periods(periods: Iterable[object], tau: Tau) -> list[int]:
    """The periods of levels, shortest first.

    Raises:
        ValueError: they do not divide each other and every tau that can be chosen, or that is not known
            before.
    """
    taus = period_of(tau).choices
    if taus is None:
        raise ValueError(
            f"levels= beside tau={tau!r}: it may choose a tau that the periods of levels do not "
            "divide; allowed are an integer, Schedule, and PostLocal with one of them"
        )
    if min(taus) == 1:
        raise ValueError(
            f"levels= beside tau={tau!r}: all average after every local step; allowed is a tau above 1"
        )
    found = sorted(
        checks.integer("period of levels", period, 1, min(taus) - 1) for period in periods
    )
    longest = [(found[-1], t) for t in sorted(taus) if found]
    for period, longer in [*itertools.pairwise(found), *longest]:
        if longer % period:
            raise ValueError(
                f"levels={found}, tau={tau}: {longer} is no multiple of {period}; allowed are periods "
                "of which each divides the next, and the longest tau"
            )
    return found


@dataclass(frozen=True)
class Schedule(Period):
    """tau by local step: `Schedule({0: 2, 1000: 8})` has rounds of 2, and of 8 from step 1000 on.

    A change takes effect where a round ends, at that step or after it.

    Args:
        taus: local step -> tau, >= 1; 0 must be among the steps.

    Raises:
        ValueError: a value outside its range.
    """

    taus: Mapping[int, int]

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not isinstance(self.taus, Mapping) or 0 not in self.taus:
            raise ValueError(
                f"taus={self.taus!r}: allowed is a mapping of local steps to tau that begins at step 0"
            )
        for step, tau in self.taus.items():
            checks.integer("step of the schedule", step, 0)
            checks.integer("tau", tau, 1)

    @property
    def smallest(self) -> int:
        """The shortest round of the table."""
        return min(self.taus.values())

    @property
    def first(self) -> int:
        """The table's tau at step 0."""
        return self.taus[0]

    @property
    def choices(self) -> frozenset[int]:
        """All taus of the table."""
        return frozenset(self.taus.values())

    def choose(
        self, step: int, tau: int, means: Mapping[str, float], memory: dict[str, float]
    ) -> Change:
        """The tau of the last step of the table that has been reached."""
        return self.taus[max(s for s in self.taus if s <= step)], "schedule"


class PostLocal(Period):
    """Averaging after every local step, blocking, until local step `start`; then the algorithm with
    its tau.

    Until then x <- mean after each local step, whatever the algorithm; it begins at `start` from
    the shared x, its anchors there too.

    Args:
        start: local steps of the synchronous phase, >= 1.
        tau: of the phase after it: local steps in a round or another period object.

    Raises:
        ValueError: a value outside its range, or one PostLocal in another.

    Source: Lin, Stich, Patel, Jaggi 2018 (arXiv 1808.07217).
    """

    def __init__(self, *, start: int, tau: Tau) -> None:
        self.start = checks.integer("start", start, 1)
        self.then = period_of(tau)
        if self.then.start:
            raise ValueError(
                f"tau={tau!r} inside PostLocal: allowed is an integer or another kind of period"
            )
        self.measures = self.then.measures
        self.remembers = self.then.remembers
        self.round_s = self.then.round_s
        self.weigh = self.then.weigh

    @property
    def smallest(self) -> int:
        """The smallest tau after `start`; the rounds of one step before it do not count."""
        return self.then.smallest

    @property
    def first(self) -> int:
        """The tau that the algorithm begins with at `start`."""
        return self.then.first

    @property
    def choices(self) -> frozenset[int] | None:
        """Every tau that can come after `start`."""
        return self.then.choices

    def choose(
        self, step: int, tau: int, means: Mapping[str, float], memory: dict[str, float]
    ) -> Change:
        """As `then` says; asked only after `start`."""
        return self.then.choose(step, tau, means, memory)

    def __eq__(self, other: object) -> bool:
        """Whether both decide alike."""
        return isinstance(other, PostLocal) and (self.start, self.then) == (other.start, other.then)

    def __hash__(self) -> int:
        """By the text of `then`: a schedule's table has no hash."""
        return hash((self.start, repr(self.then)))

    def __repr__(self) -> str:
        """The call that makes it, which workers compare and checkpoints hold."""
        return f"PostLocal(start={self.start}, tau={self.then!r})"


@dataclass(frozen=True)
class HideCommunication(Period):
    """The smallest tau that hides the means behind computation, as measured: ceil((1 + margin)
    communication / step).

    Both times are measured by every worker and their means travel with the parameters, so that all
    workers decide alike and nothing waits for it. tau comes down only where twice the margin would
    fit, lest it swing. It needs an algorithm whose delay is the whole round.

    Args:
        smallest: bound of tau, >= 1. It begins there, or with a round of two steps after which tau
            follows from the link as measured at construction (`AveragingOptimizer.link`).
        largest: bound of tau, >= smallest.
        margin: time left over, as a share of the communication's, in [0, 10]; default 0.1, against
            jitter.

    Raises:
        ValueError: a value outside its range.
    """

    smallest: int = 1
    largest: int = 1000
    margin: float = 0.1
    measures = ("step_s", "communication_s")

    def __post_init__(self) -> None:
        """Check the ranges."""
        checks.integer("smallest", self.smallest, 1)
        checks.integer("largest", self.largest, self.smallest)
        checks.number("margin", self.margin, 0, 10)

    @property
    def first_timed(self) -> int | None:
        """Two local steps, where a round may be so long."""
        return max(self.smallest, 2) if self.largest > 1 else None

    def choose(
        self, step: int, tau: int, means: Mapping[str, float], memory: dict[str, float]
    ) -> Change:
        """From the ratio of the two times."""
        if not means or means["communication_s"] <= 0 or means["step_s"] <= 0:
            return tau, "nothing measured yet"
        ratio = means["communication_s"] / means["step_s"]
        enough, plenty = (self._bound(math.ceil(ratio * (1 + k * self.margin))) for k in (1, 2))
        why = f"communication takes {ratio:.2f} local steps of {1e3 * means['step_s']:.3g} ms"
        return (enough if enough > tau else min(plenty, tau)), why

    def _bound(self, tau: int) -> int:
        return min(max(tau, self.smallest), self.largest)


@dataclass(frozen=True)
class AdaComm(Period):
    """tau falls with the loss: tau = ceil(tau0 sqrt(loss / loss0)), once every `interval` local
    steps.

    Where that is no smaller than before, tau <- ceil(gamma tau). Report the loss with
    `average(loss=loss)`; what counts is its mean over the workers and the interval, and loss0 is
    that of the first round.

    Args:
        tau0: the first tau, >= 1.
        interval: local steps between two decisions, >= 1; the paper has 60 seconds, on which
            workers cannot agree.
        gamma: factor where the loss is stuck, in (0, 1); default 0.5, the paper's.
        follow_lr: tau = ceil(tau0 sqrt(lr0 / lr loss / loss0)) instead, so that a learning rate
            that decays makes rounds longer. lr0 is the largest so far, not the first, which a
            warm-up would make too small; gamma then waits for intervals with an unchanged lr. Both
            are our choice; without warm-up lr0 is the paper's.
        largest: bound of tau, >= tau0.

    Raises:
        ValueError: a value outside its range.

    Source: Wang, Joshi 2018 (arXiv 1810.08313), section 4.
    """

    tau0: int
    interval: int = 100
    gamma: float = 0.5
    follow_lr: bool = False
    largest: int = 1000
    measures = ("loss", "lr")
    remembers = ("loss0", "lr0", "lr", "since", "sum", "rounds")

    def __post_init__(self) -> None:
        """Check the ranges."""
        checks.integer("tau0", self.tau0, 1)
        checks.integer("interval", self.interval, 1)
        checks.number("gamma", self.gamma, 0, 1, open_low=True, open_high=True)
        checks.flag("follow_lr", self.follow_lr)
        checks.integer("largest", self.largest, self.tau0)

    @property
    def smallest(self) -> int:
        """One: the loss may fall to nothing."""
        return 1

    @property
    def first(self) -> int:
        """tau0, before any loss is known."""
        return self.tau0

    def choose(
        self, step: int, tau: int, means: Mapping[str, float], memory: dict[str, float]
    ) -> Change:
        """From the mean loss of the interval, where one ends."""
        if not means or not all(map(math.isfinite, means.values())):
            return tau, "no loss"
        loss, lr = means["loss"], means["lr"]
        if "loss0" not in memory:
            memory.update(loss0=loss, lr0=lr, lr=lr, since=step, sum=0.0, rounds=0)
            return tau, "the first loss"
        memory["sum"] += loss
        memory["rounds"] += 1
        if step - memory["since"] < self.interval:
            return tau, "within an interval"
        loss = memory["sum"] / memory["rounds"]
        same_lr = memory["lr"] == lr
        memory.update(sum=0.0, rounds=0, since=step, lr=lr, lr0=max(memory["lr0"], lr))
        ratio = max(loss, 0.0) / memory["loss0"] if memory["loss0"] > 0 else 1.0
        if self.follow_lr and memory["lr0"] > 0:
            ratio = ratio * memory["lr0"] / lr if lr > 0 else math.inf
        new = max(1, math.ceil(min(self.largest, self.tau0 * math.sqrt(ratio))))
        if new >= tau and (same_lr or not self.follow_lr):
            return math.ceil(self.gamma * tau), f"the loss is stuck at {loss:.4g}"
        return new, f"loss {loss:.4g}, at first {memory['loss0']:.4g}"


@dataclass(frozen=True)
class EqualTime(Period):
    """Rounds of equal time, for workers of unequal speed: each makes as many local steps as fit.

    A worker's round ends with the local step nearest to `round_s` seconds of its own computation,
    waiting left out, so that workers arrive together and nobody waits for the slowest. What a worker
    sends weighs w_i for its n_i local steps, mean = sum w_i x_i / sum w_i, and for small learning
    rates training ends where sum_i w_i n_i F_i is least, F_i the loss on worker i's data:

    - "steps": w_i = n_i, or the samples of these steps. The most progress a round; for data that are
      alike on all workers, where it does not matter which F_i counts more.
    - "workers": w_i = 1 / n_i (FedNova's normalised averaging). Every worker's data count alike,
      whatever its speed.

    In the first round all weigh alike, since how many steps are usual is known only after it.

    It needs one message a round (`fragments=1`) and the delay 0 or the whole round. Workers make
    different numbers of local steps, so calls that all make together (`averaged()`, `flush()`,
    saving) go by `optimizer.rounds`, and the loop's end is that of `join()`.

    Args:
        round_s: seconds of computation in a round, > 0. At least a local step of the slowest worker,
            which makes one a round if it takes longer, and the others then wait for it.
        weigh: "steps" or "workers".

    Raises:
        ValueError: a value outside its range.

    Source: Wang et al. 2020 (FedNova, arXiv 2007.07481) for the weights; local steps by speed: Liu
        et al. 2024 (dynamic local updates, arXiv 2401.09135).
    """

    round_s: float
    weigh: str = "steps"
    measures = ("steps",)
    remembers = ("steps",)

    def __post_init__(self) -> None:
        """Check the ranges."""
        checks.number("round_s", self.round_s, 0, 1e9, open_low=True)
        if self.weigh not in WEIGHTS:
            raise ValueError(f"weigh={self.weigh!r}: allowed is one of {', '.join(WEIGHTS)}")

    @property
    def smallest(self) -> int:
        """One: of a worker whose local step takes longer than a round."""
        return 1
