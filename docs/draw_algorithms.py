"""Draw docs/algorithms/*.svg: what each algorithm does with two workers in three rounds.

The engine itself runs, in lockstep, on one number: each worker is drawn to an optimum of its own, by plain
SGD. Run: python docs/draw_algorithms.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import distoptim
from distoptim.testing.lockstep import Lockstep

FOLDER = Path(__file__).with_name("algorithms")
TAU = 4
ROUNDS = 3
LR = 0.12
OPTIMA = torch.tensor([2.0, -0.6])
START = 0.0
# One number cannot be cut into fragments, nor coded; and plain SGD has no momentum to move.
OPTIONS: dict[str, dict[str, Any]] = {
    "GlobalMomentum": {"codec": None, "momentum": 0.7},
    "StreamingDiLoCo": {"fragments": 1},
}
DRAWN = (
    *("LocalSGD", "CoCoDSGD", "BMUF", "SlowMo", "OverlapLocalSGD", "OverlapBMUF", "GlobalMomentum"),
    *("EASGD", "DiLoCo", "StreamingDiLoCo", "EagerDiLoCo", "CO2"),
)

WIDTH = 330
HEIGHT = 170
LEFT = 12
TOP = 30
BOTTOM = 22
STYLE = """
text { font: 11px sans-serif; fill: #333 }
.name { font-weight: bold; font-size: 12px }
.card { fill: white; stroke: #ddd }
.flight { fill: #fbe3ad }
.step { stroke: #eee }
.worker { fill: none; stroke-width: 1.8; stroke-linejoin: round }
.sent { stroke: white; stroke-width: 0.8 }
.one { stroke: #0072b2 } .sent.one { fill: #0072b2 }
.other { stroke: #d55e00 } .sent.other { fill: #d55e00 }
.anchor { fill: none; stroke: #333; stroke-width: 1.4; stroke-dasharray: 4 3 }
"""

Point = tuple[float, float]


@dataclass
class Walk:
    """What was seen of a run.

    Attributes:
        workers: each one's path of (local steps, x); a merge is two points at one step.
        anchor: its path; empty in an algorithm without one.
        flights: local steps of each launch and of its merge.
        sent: (local step, worker, x) of each launch.
        when: tau and delay.
    """

    workers: list[list[Point]]
    anchor: list[Point] = field(default_factory=list)
    flights: list[tuple[int, int]] = field(default_factory=list)
    sent: list[tuple[int, int, float]] = field(default_factory=list)
    when: str = ""


def gradient(rank: int, params: list[Tensor]) -> list[Tensor]:
    """Of (x - optimum)^2 / 2."""
    return [params[0] - OPTIMA[rank]]


def walk(make: Callable[..., Any]) -> Walk:
    """Run an algorithm, and look before and after every average."""
    workers = Lockstep(make, [[torch.tensor([START])] for _ in OPTIMA])
    seen = Walk([[(0, START)] for _ in OPTIMA])
    launched = 0

    def look(step: int) -> None:
        for path, x in zip(seen.workers, workers.x()[:, 0].tolist(), strict=True):
            path.append((step, x))
        if workers.has_anchor():
            seen.anchor.append((step, float(workers.anchors()[0])))

    if workers.has_anchor():
        seen.anchor.append((0, START))
    for step in range(1, ROUNDS * TAU + 1):
        workers.local_step(gradient)
        look(step)
        workers.average()
        (view,) = workers.views()[0].fragments
        if view.launched > launched:
            launched = view.launched
            before = [path[-1][1] for path in seen.workers]
            seen.sent += [(step, worker, x) for worker, x in enumerate(before)]
            seen.flights.append((step, view.due or step))
        look(step)
    first = workers.views()[0]
    seen.when = f"tau = {first.tau}, delay = {first.delay}"
    return seen


@dataclass(frozen=True)
class Scale:
    """From local steps and x to a picture's points; the same in all pictures."""

    low: float
    high: float

    def at(self, point: Point) -> Point:
        """Where a point lies."""
        step, x = point
        right = LEFT + (WIDTH - 2 * LEFT) * step / (ROUNDS * TAU)
        down = TOP + (HEIGHT - TOP - BOTTOM) * (self.high - x) / (self.high - self.low)
        return right, down

    def path(self, points: list[Point]) -> str:
        """A line through them, without those that it stays at."""
        kept = [b for a, b in pairwise([None, *points]) if a != b]
        return "M" + " ".join(f"{x:.1f},{y:.1f}" for x, y in map(self.at, kept))


def picture(name: str, seen: Walk, scale: Scale) -> str:
    """One algorithm's card."""
    _, top = scale.at((0, scale.high))
    _, bottom = scale.at((ROUNDS * TAU, scale.low))
    parts = [
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="6"/>',
        f'<text class="name" x="{LEFT}" y="19">{escape(name)}</text>',
        f'<text x="{WIDTH - LEFT}" y="19" text-anchor="end">{seen.when}</text>',
    ]
    for launch, merge in seen.flights:
        begin, _ = scale.at((launch, 0))
        # What is still on its way when the picture ends would lie beside it.
        end, _ = scale.at((min(merge, ROUNDS * TAU), 0))
        parts.append(
            f'<rect class="flight" x="{begin:.1f}" y="{top}" width="{end - begin:.1f}" '
            f'height="{bottom - top:.1f}"/>'
        )
    for step in range(0, ROUNDS * TAU + 1, TAU):
        x, _ = scale.at((step, 0))
        parts.append(f'<path class="step" d="M{x:.1f},{top} V{bottom:.1f}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 7}" text-anchor="middle">{step}</text>')
    if seen.anchor:
        parts.append(f'<path class="anchor" d="{scale.path(seen.anchor)}"/>')
    kinds = ("one", "other")
    for kind, path in zip(kinds, seen.workers, strict=True):
        parts.append(f'<path class="worker {kind}" d="{scale.path(path)}"/>')
    for step, worker, value in seen.sent:
        x, y = scale.at((step, value))
        parts.append(f'<circle class="sent {kinds[worker]}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img"><title>{escape(name)}: two workers, three rounds</title>'
        f"<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def main() -> None:
    """Run all, then draw all on one scale."""
    walks = {}
    for name in DRAWN:
        options = {"tau": TAU, "lr": LR, **OPTIONS.get(name, {})}
        if name == "GlobalMomentum":
            del options["tau"]
        walks[name] = walk(
            lambda params, name=name, options=options, **where: getattr(distoptim, name)(
                params, **options, **where
            )
        )
    values = [x for seen in walks.values() for path in seen.workers for _, x in path]
    scale = Scale(min(values), max(values))
    FOLDER.mkdir(exist_ok=True)
    for name, seen in walks.items():
        (FOLDER / f"{name}.svg").write_text(picture(name, seen, scale))


if __name__ == "__main__":
    main()
