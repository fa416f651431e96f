"""tau: how long a round is, fixed or chosen while training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from distoptim import checks

Change = tuple[int, str]


class Period(ABC):
    """Says how many local steps the next round has; asked where a round ends, before the next
    launch.

    Subclasses are frozen dataclasses, on which all workers must agree. What they decide must follow
    from what is
    equal on all workers: the local step and the means.

    Attributes:
        measures: what each worker sends along, so that its mean over the workers can be decided on:
            of "loss", "lr", "step_s" (computing a local step) and "communication_s" (all means of a
            round).
        start: local step until which the workers average after every local step.
    """

    measures: tuple[str, ...] = ()
    start: int = 0

    @property
    @abstractmethod
    def smallest(self) -> int:
        """The smallest tau it will choose."""

    @property
    def first(self) -> int:
        """The tau it begins with."""
        return self.smallest

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
            memory: what it wants to remember; part of the checkpoint.
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
        """That."""
        return self.tau

    @property
    def choices(self) -> frozenset[int]:
        """That."""
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
        """Of all."""
        return min(self.taus.values())

    @property
    def first(self) -> int:
        """At step 0."""
        return self.taus[0]

    @property
    def choices(self) -> frozenset[int]:
        """Those of the table."""
        return frozenset(self.taus.values())

    def choose(
        self, step: int, tau: int, means: Mapping[str, float], memory: dict[str, float]
    ) -> Change:
        """As the table says."""
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

    @property
    def smallest(self) -> int:
        """Of the phase after `start`."""
        return self.then.smallest

    @property
    def first(self) -> int:
        """Of the phase after `start`."""
        return self.then.first

    @property
    def choices(self) -> frozenset[int] | None:
        """Of the phase after `start`."""
        return self.then.choices

    def choose(
        self, step: int, tau: int, means: Mapping[str, float], memory: dict[str, float]
    ) -> Change:
        """As in the phase after `start`."""
        return self.then.choose(step, tau, means, memory)

    def __eq__(self, other: object) -> bool:
        """Equal in all it decides."""
        return isinstance(other, PostLocal) and (self.start, self.then) == (other.start, other.then)

    def __hash__(self) -> int:
        """Of its parts."""
        return hash((self.start, repr(self.then)))

    def __repr__(self) -> str:
        """As it is made."""
        return f"PostLocal(start={self.start}, tau={self.then!r})"
