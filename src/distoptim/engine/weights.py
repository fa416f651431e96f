"""What a worker's payload weighs: its samples, its local steps, or its share of those of a round."""

from __future__ import annotations

from typing import Any, final

from distoptim import checks
from distoptim.engine.identity import Weighing

# Of one local step: counts, whose sums are exact, and whose products with a parameter neither overflow nor
# vanish (see `reducer.LIMITS`).
_FEWEST = 1e-6
_MOST = 1e9


@final
class Weights:
    """Counts a worker's samples, and knows when it has run out of data.

    By default all workers weigh the same. With `average(samples=n)` a payload weighs as many samples as
    the worker had since its last launch. A worker that has left the block of `join()` weighs 0.

    Args:
        by: what payloads of a round of equal time weigh (see `EqualTime`); None: such rounds there
            are none.

    Attributes:
        samples: so far; None where they are not counted.
        left_at: the local step at which this worker ran out of data.
        counted: whether samples come with every local step; None before the first.
    """

    def __init__(self, by: str | None = None) -> None:
        self.by = by
        self.samples: float | None = None
        self.left_at: int | None = None
        self.counted: bool | None = None

    @property
    def weighing(self) -> Weighing:
        """What messages say of it."""
        if self.samples is not None:
            return Weighing.SAMPLES
        return Weighing.UNKNOWN if self.counted is None else Weighing.ALIKE

    @property
    def total(self) -> float:
        """Samples so far, 0 where they are not counted."""
        return self.samples or 0.0

    def report(self, samples: float | None) -> None:
        """Note whether a local step comes with its samples, and how many.

        Raises:
            ValueError: it does and others did not, or the other way round: the round's weight would be
                a part of it; or they are no count.
        """
        given = samples is not None
        if self.counted is None:
            self.counted = given or self.samples is not None
        if given != self.counted:
            raise ValueError(
                f"average() {'with' if given else 'without'} samples= after steps "
                f"{'without' if given else 'with'}; allowed is at every step or never"
            )
        if samples is not None:
            number = checks.number("samples", samples, 0, _MOST)
            if 0 < number < _FEWEST:
                raise ValueError(f"samples={samples!r}: allowed is 0, or {_FEWEST:g} or more")
            self.samples = self.total + number

    def weight(self, *, step: int, since: int, samples: float) -> float:
        """Of a payload: samples since the last launch, or the share of local steps made."""
        if self.samples is not None:
            return self.samples - samples
        if self.left_at is None:
            return 1.0
        return max(0, min(self.left_at, step) - since) / max(1, step - since)

    def weight_of_time(
        self, *, step: int, since: int, samples: float, usual: float | None
    ) -> float:
        """Of a payload of a round of equal time.

        Args:
            step: local steps done.
            since: local step of the last launch.
            samples: at the last launch.
            usual: local steps in a round, as all workers know it; None: not yet, and all who have
                made one weigh alike.
        """
        last = step if self.left_at is None else min(step, self.left_at)
        made = max(0, last - since)
        if not made:
            return 0.0
        if self.samples is None:
            if usual is None:
                return 1.0
            return made / usual if self.by == "steps" else usual / made
        counted = self.samples - samples
        return counted if self.by == "steps" else counted / made**2

    def share(self, mean: float) -> float:
        """Of the workers, how many are in a mean of this mean weight.

        Weights by samples or local steps do not tell, and count as 1.
        """
        known = self.by is None and self.samples is None
        return min(mean, 1.0) if known else 1.0

    def state_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"samples": self.samples}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.samples = saved["samples"]
        self.counted = None
