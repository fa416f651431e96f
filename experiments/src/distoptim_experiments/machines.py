"""The virtual machines of a simulated run, and how random slow-downs are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from distoptim.comm import Link
from distoptim.simulator.churn import Churn, Listed, Regular
from distoptim.simulator.compute import (
    Compute,
    Constant,
    Pareto,
    ShiftedExponential,
    Trace,
    Unequal,
)
from distoptim.simulator.network import Gloo, Network, Ring, Tree, TwoTier
from distoptim_experiments.settings import Needs, Number, Option, Settings

SECTION = "Virtual machines"
PARETO_SHAPE = 2.5
"""Tail index of the slow-down called "pareto": the variance is finite, barely."""

Slowdown = Literal["none", "exponential", "pareto"]

_NO_TRACE = Needs("without --trace", lambda v: not v["trace"])
_SITES = Needs("with --site-size", lambda v: v["site_size"])
_NO_SITES = Needs("without --site-size", lambda v: not v["site_size"])
_FLAT_RING = Needs(
    "with --collective ring and without --site-size",
    lambda v: v["collective"] == "ring" and not v["site_size"],
)
_NO_CHURN = Needs("without --churn", lambda v: not v["churn"])
_LOSSES = Needs("with --lose-every-s", lambda v: v["lose_every_s"] > 0)
_COME_AND_GO = Needs(
    "with --churn or --lose-every-s", lambda v: v["churn"] or v["lose_every_s"] > 0
)
_FEWER = Needs("with more --workers than that", lambda v: v["site_size"] < v["workers"])


class Machines(Settings):
    """How fast the workers compute and speak.

    Raises:
        ValueError: a value outside its range, or a damaged trace.
    """

    step_ms: Annotated[
        Number,
        Field(gt=0, le=1e9, description="Milliseconds of a local step, on average."),
        Option(SECTION, needs=_NO_TRACE),
    ] = 30.0
    speeds: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1e9)], ...],
        Field(strict=False, description="Of the workers, in turn: steps take so much less time."),
        Option(SECTION, needs=_NO_TRACE),
    ] = ()
    slowdown: Annotated[
        Slowdown,
        Field(
            description="Random part of it: half of it exponential, or a heavy tail (Pareto, shape "
            f"{PARETO_SHAPE})."
        ),
        Option(SECTION, needs=_NO_TRACE),
    ] = "none"
    trace: Annotated[
        str | None,
        Field(
            description="Step times as recorded instead: a CSV line per step, seconds, a column per "
            "worker (more are left out)."
        ),
        Option(SECTION, metavar="FILE"),
    ] = None
    latency_ms: Annotated[
        Number, Field(ge=0, le=1e9, description="Milliseconds one message takes."), Option(SECTION)
    ] = 0.0
    bandwidth_gbit_s: Annotated[
        Number | None,
        Field(gt=0, description="Each worker's rate, in Gbit/s."),
        Option(SECTION, unset="no limit"),
    ] = None
    collective: Annotated[
        Literal["ring", "tree"],
        Field(description="Kind of all-reduce."),
        Option(SECTION, needs=_NO_SITES),
    ] = "ring"
    streams: Annotated[
        int | None,
        Field(
            ge=1,
            le=64,
            description="Connections at once in a mean, each of which moves 1.75 MB a round trip.",
        ),
        Option(SECTION, needs=_FLAT_RING, unset="no such limit"),
    ] = None
    site_size: Annotated[
        int | None,
        Field(ge=2, description="Workers of one site, with fast links to each other."),
        Option(SECTION, needs=_FEWER),
    ] = None
    site_latency_ms: Annotated[
        Number,
        Field(ge=0, le=1e9, description="Inside a site."),
        Option(SECTION, needs=_SITES),
    ] = 0.0
    site_bandwidth_gbit_s: Annotated[
        Number | None,
        Field(gt=0, description="Inside a site."),
        Option(SECTION, needs=_SITES, unset="no limit"),
    ] = None

    churn: Annotated[
        str | None,
        Field(
            description="Workers that come and go: a CSV line per change, seconds,worker,what, of what "
            "is lost, left or back."
        ),
        Option(SECTION, metavar="FILE"),
    ] = None
    lose_every_s: Annotated[
        Number,
        Field(
            ge=0,
            le=1e9,
            description="A worker, drawn at random, is lost every so many seconds; 0: none.",
        ),
        Option(SECTION, needs=_NO_CHURN),
    ] = 0.0
    away_s: Annotated[
        Number,
        Field(gt=0, le=1e9, description="So many seconds later it is back, and joins the others."),
        Option(SECTION, needs=_LOSSES),
    ] = 60.0
    heartbeat_s: Annotated[
        Number,
        Field(
            ge=0,
            le=1e9,
            description="So long the others wait in their next mean for one that was lost.",
        ),
        Option(SECTION, needs=_COME_AND_GO),
    ] = 5.0

    @model_validator(mode="after")
    def _check(self) -> Machines:
        self.compute(seed=0)
        self.churns(seed=0)
        return self

    def churns(self, *, seed: int) -> Churn | None:
        """Who comes and goes; None: all are there all the time."""
        if self.churn is not None:
            return Listed.read(self.churn)
        if self.lose_every_s:
            return Regular(self.lose_every_s, self.away_s, seed)
        return None

    def compute(self, *, seed: int) -> Compute:
        """The model of computation time."""
        step_s = self.step_ms / 1e3
        if self.trace is not None:
            return Trace(Path(self.trace))
        made: Compute = Constant(step_s)
        if self.slowdown == "exponential":
            made = ShiftedExponential(step_s / 2, step_s / 2, seed)
        elif self.slowdown == "pareto":
            made = pareto(step_s, seed)
        return Unequal(made, self.speeds) if self.speeds else made

    def network(self) -> Network:
        """The model of communication time."""
        outer = _link(self.latency_ms, self.bandwidth_gbit_s)
        if self.site_size is not None:
            inner = _link(self.site_latency_ms, self.site_bandwidth_gbit_s)
            return TwoTier(self.site_size, inner, outer)
        if self.collective == "tree":
            return Tree([outer])
        return Ring([outer]) if self.streams is None else Gloo(outer, self.streams)


def pareto(mean_s: float, seed: int) -> Pareto:
    """Seconds with a heavy tail and this mean."""
    return Pareto(mean_s * ((PARETO_SHAPE - 1) / PARETO_SHAPE), PARETO_SHAPE, seed)


def _link(latency_ms: float, bandwidth_gbit_s: float | None) -> Link:
    return Link(latency_ms / 1e3, float("inf") if bandwidth_gbit_s is None else bandwidth_gbit_s)
