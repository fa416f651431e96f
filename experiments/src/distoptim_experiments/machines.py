"""The virtual machines of a simulated run, as plain data that goes into its record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distoptim import checks
from distoptim.comm import Link
from distoptim.simulator.compute import Compute, Constant, Pareto, ShiftedExponential, Trace
from distoptim.simulator.network import Islands, Network, Ring, Tree

SLOWDOWNS = ("none", "exponential", "pareto")
COLLECTIVES: dict[str, Callable[[Sequence[Link]], Network]] = {"ring": Ring, "tree": Tree}


@dataclass(frozen=True, kw_only=True)
class Machines:
    """How fast the workers compute and speak.

    Args:
        step_ms: milliseconds of a local step, on average over a random slow-down, > 0.
        slowdown: "none"; "exponential": half of the step's mean is fixed, half an exponential
            delay; "pareto": a heavy tail with shape 2.5.
        trace: a file of recorded step times (`Trace`) instead of both.
        latency_ms: milliseconds one message takes, >= 0.
        bandwidth_gbit_s: each worker's rate in Gbit/s, > 0; None means that only latency counts.
        collective: "ring" or "tree".
        island: workers in an island of fast links, >= 2; None means no islands.
        island_latency_ms, island_bandwidth_gbit_s: of the links inside an island.

    Raises:
        ValueError: a value outside its range, or a damaged trace.
    """

    step_ms: float = 30.0
    slowdown: str = "none"
    trace: str | None = None
    latency_ms: float = 0.0
    bandwidth_gbit_s: float | None = None
    collective: str = "ring"
    island: int | None = None
    island_latency_ms: float = 0.0
    island_bandwidth_gbit_s: float | None = None

    def __post_init__(self) -> None:
        """Check all values."""
        for name, allowed in (("slowdown", SLOWDOWNS), ("collective", COLLECTIVES)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: allowed is one of {', '.join(allowed)}"
                )
        if self.island is not None:
            checks.integer("island", self.island, 2)
        self.compute(seed=0)
        self.network()

    def compute(self, *, seed: int) -> Compute:
        """The model of computation time."""
        step_s = checks.number("step_ms", self.step_ms, 0, 1e9, open_low=True) / 1e3
        if self.trace is not None:
            return Trace(Path(self.trace))
        if self.slowdown == "exponential":
            return ShiftedExponential(step_s / 2, step_s / 2, seed)
        if self.slowdown == "pareto":
            return Pareto(step_s * 0.6, 2.5, seed)
        return Constant(step_s)

    def network(self) -> Network:
        """The model of communication time."""
        outer = _link(self.latency_ms, self.bandwidth_gbit_s)
        if self.island is not None:
            return Islands(
                self.island, _link(self.island_latency_ms, self.island_bandwidth_gbit_s), outer
            )
        return COLLECTIVES[self.collective]([outer])

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def _link(latency_ms: float, bandwidth_gbit_s: float | None) -> Link:
    return Link(
        checks.number("latency_ms", latency_ms, 0, 1e9) / 1e3,
        float("inf") if bandwidth_gbit_s is None else bandwidth_gbit_s,
    )
