"""The picture of error against time.

What is on the front is named, all else is told by the legend.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from distoptim_experiments.report import drawing
from distoptim_experiments.report import runs as grid
from distoptim_experiments.report.runs import Run

_SHARE, _ROOM = 1 / 8, 0.4
_TEXT_PT, _MARKER_PT, _EDGE_PT = 8.5, 10.0, 13.0
Place = tuple[float, float]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Point:
    """A method at one period: mean seconds of the whole run, mean test error in per cent.

    DDP has no tau.
    """

    name: str
    style: int
    tau: int | None
    x: float
    y: float

    @property
    def told(self) -> str:
        """Method and period."""
        return self.name if self.tau is None else f"{self.name}, tau {self.tau}"


def front(runs: Sequence[Run], label: str) -> str:
    """Test error against seconds, a panel per partition, a line per method; larger markers for
    longer periods.

    A few points that are far from all others stand at the border, with an arrow and their values.
    """
    columns, taus = grid.partitions(runs), grid.taus(runs)
    sizes = {tau: 6 + 4 * k / max(1, len(taus) - 1) for k, tau in enumerate(taus)}

    def fill(axes: Any) -> None:
        panels = [
            (axis, points([run for run in runs if run.partition == partition]))
            for axis, partition in zip(axes[0], columns, strict=True)
        ]
        for k, (axis, shown) in enumerate(panels):
            axis.set_title(columns[k])
            axis.set_xlabel(f"{label} of the whole run")
            axis.grid(color=drawing.GREY, alpha=0.25)
            axis.margins(0.12)
            right, top = limits(shown)
            for p in shown:
                axis.plot(min(p.x, right), min(p.y, top))
            drawing.heights(axes[:, [k]])
        axes[0][0].set_ylabel("test error, %")
        drawing.names(axes, grid.labels(runs), {f"tau {tau}": size for tau, size in sizes.items()})
        axes[0][0].figure.draw_without_rendering()
        for axis, shown in panels:
            _draw(axis, shown, sizes)

    return drawing.svg(fill, 1, len(columns), height=4.2)


def points(runs: Sequence[Run]) -> list[Point]:
    """Of the methods and periods at which no seed diverged."""
    out = []
    for (name, tau), group in grid.by(runs, lambda run: (run.label, run.tau)).items():
        errors = [100 * (1 - v) for run in group if (v := run.value("test_accuracy")) is not None]
        if errors and not any(run.diverged for run in group):
            seconds = statistics.fmean(run.summary.seconds for run in group)
            out.append(
                Point(
                    name,
                    group[0].style,
                    None if group[0].synchronous else tau,
                    seconds,
                    statistics.fmean(errors),
                )
            )
    return out


def best(shown: Sequence[Point]) -> list[Point]:
    """The front, from left to right.

    Points of which none is better in one and at least as good in the other.
    """
    return sorted(
        (
            p
            for p in shown
            if not any(q.x <= p.x and q.y <= p.y and (q.x, q.y) != (p.x, p.y) for q in shown)
        ),
        key=lambda p: (p.x, p.y),
    )


def limit(values: Sequence[float]) -> float:
    """The largest value that has its place on the axis.

    Up to an eighth of them are beyond it, if they would leave all others less than 0.4 of the axis.
    """
    ordered = sorted(values) or [0.0]
    for beyond in range(1, int(_SHARE * len(ordered)) + 1):
        kept = ordered[:-beyond]
        if 0 < kept[-1] - kept[0] < _ROOM * (ordered[-1] - ordered[0]):
            return kept[-1]
    return ordered[-1]


def limits(shown: Sequence[Point]) -> Place:
    """Of both axes."""
    return limit([p.x for p in shown]), limit([p.y for p in shown])


def apart(places: Sequence[Place]) -> list[Place]:
    """Move points sideways, as little as does, until no marker covers another."""
    out: dict[int, Place] = {}
    for i in sorted(range(len(places)), key=lambda i: places[i][::-1]):
        x, y = places[i]
        for k in range(2 * len(places)):
            moved = x + _MARKER_PT * ((k + 1) // 2) * (-1 if k % 2 else 1), y
            if all(
                abs(moved[0] - a) >= _MARKER_PT or abs(y - b) >= 0.8 * _MARKER_PT
                for a, b in out.values()
            ):
                break
        out[i] = moved
    return [out[i] for i in range(len(places))]


def room(
    width: float, at: Place, inside: Box, taken: Sequence[Box]
) -> tuple[float, float, bool] | None:
    """Where a name fits beside a point: its offset and whether it ends there, in points; None if
    nowhere.

    Left of a point of the front and below it there is nothing better, so that is looked at first.
    """
    for distance in range(0, 160, 6):
        for dy in (-distance, distance):
            for ends in (True, False):
                dx = (-1 if ends else 1) * (9 if distance < 6 else 5)
                left = at[0] + dx - (width if ends else 0)
                box = left, at[1] + dy - 0.6 * _TEXT_PT, left + width, at[1] + dy + 0.6 * _TEXT_PT
                if (
                    inside[0] <= box[0]
                    and inside[1] <= box[1]
                    and box[2] <= inside[2]
                    and box[3] <= inside[3]
                    and not any(
                        box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3]
                        for b in taken
                    )
                ):
                    return dx, dy, ends
    return None


def _draw(axis: Any, shown: Sequence[Point], sizes: Mapping[int, float]) -> None:
    """Lines, markers, the front and its names, on axes that stay as they are."""
    axis.set_xlim(axis.get_xlim())
    axis.set_ylim(axis.get_ylim())
    pt, back = axis.figure.dpi / 72, axis.transData.inverted()
    right, top = limits(shown)
    beyond = [(p.x > right, p.y > top) for p in shown]
    ahead = {i for i, p in enumerate(shown) if p in best(shown) and not any(beyond[i])}
    at = apart([_place(axis, p, b, pt) for p, b in zip(shown, beyond, strict=True)])
    data = [tuple(back.transform((x * pt, y * pt))) for x, y in at]
    for group in grid.by(range(len(shown)), lambda i: shown[i].name).values():
        near = [data[i] for i in group if not any(beyond[i])]
        look = drawing.look(shown[group[0]].style)
        axis.plot(
            [x for x, _ in near],
            [y for _, y in near],
            **{**look, "marker": None},
            linewidth=1.2,
            alpha=0.45,
        )
        for i in group:
            axis.plot(
                *data[i], **look, markersize=sizes.get(shown[i].tau or 0, 7.5), markeredgewidth=0
            )
    edge = sorted(at[i] for i in ahead)
    corners = [
        (x, y)
        for (_, before), (x, y) in zip(edge[:1] + edge, edge, strict=False)
        for y in (before, y)
    ]
    if edge:
        corners.append((axis.bbox.x1 / pt, edge[-1][1]))
        line = back.transform([(x * pt, y * pt) for x, y in corners])
        axis.plot(line[:, 0], line[:, 1], color=drawing.GREY, linewidth=1, alpha=0.7, zorder=1)
    for i, (aside, above) in enumerate(beyond):
        if aside or above:
            tip = back.transform(
                ((at[i][0] + _EDGE_PT * aside) * pt, (at[i][1] + _EDGE_PT * above) * pt)
            )
            axis.annotate(
                "",
                tip,
                data[i],
                annotation_clip=False,
                arrowprops={"arrowstyle": "->", "color": drawing.colour(shown[i].style)},
            ).set_in_layout(False)
    _name(axis, _texts(shown, ahead, beyond, at), at, data, corners, pt)


def _place(axis: Any, point: Point, beyond: tuple[bool, bool], pt: float) -> Place:
    """In points of the figure; of what is beyond the axes, inside of their border."""
    x, y = (
        axis.transData.transform(
            (min(point.x, axis.get_xlim()[1]), min(point.y, axis.get_ylim()[1]))
        )
        / pt
    )
    return x - _EDGE_PT * beyond[0], y - _EDGE_PT * beyond[1]


def _texts(
    shown: Sequence[Point],
    ahead: Set[int],
    beyond: Sequence[tuple[bool, bool]],
    at: Sequence[Place],
) -> dict[int, str]:
    """Point -> what is said of it, from left to right.

    Names of the front, and values beyond the axes by method.
    """
    said = {i: shown[i].told for i in ahead}
    for group in grid.by(
        [i for i, b in enumerate(beyond) if any(b)], lambda i: (shown[i].name, beyond[i])
    ).values():
        values = []
        for i in group:
            value = ", ".join(
                [f"{shown[i].x:.0f} s"] * beyond[i][0] + [f"{shown[i].y:.1f} %"] * beyond[i][1]
            )
            values.append(value + (f" (tau {shown[i].tau})" if shown[i].tau is not None else ""))
        said[max(group, key=lambda i: at[i])] = f"{shown[group[0]].name}: {', '.join(values)}"
    return {i: said[i] for i in sorted(said, key=lambda i: at[i])}


def _name(
    axis: Any,
    said: Mapping[int, str],
    at: Sequence[Place],
    data: Sequence[Any],
    line: Sequence[Place],
    pt: float,
) -> None:
    """Write what is said of points beside them, where no text covers marker, line or other text.

    Else leave it out.
    """
    box, half = axis.bbox, _MARKER_PT / 2
    inside = (box.x0 / pt, box.y0 / pt, box.x1 / pt, box.y1 / pt)
    taken: list[Box] = [(x - half, y - half, x + half, y + half) for x, y in at]
    taken += [
        (min(a, c), min(b, d), max(a, c), max(b, d)) for (a, b), (c, d) in itertools.pairwise(line)
    ]
    for i, text in said.items():
        measured = axis.text(0, 0, text, fontsize=_TEXT_PT)
        width = measured.get_window_extent().width / pt
        measured.remove()
        found = room(width, at[i], inside, taken)
        if found is None:
            continue
        dx, dy, ends = found
        axis.annotate(
            text,
            data[i],
            (dx, dy),
            textcoords="offset points",
            fontsize=_TEXT_PT,
            va="center",
            ha="right" if ends else "left",
            arrowprops={
                "arrowstyle": "-",
                "color": drawing.GREY,
                "linewidth": 0.7,
                "shrinkA": 0,
                "shrinkB": 0,
                "relpos": (float(ends), 0.5),
            },
        ).set_in_layout(False)
        left = at[i][0] + dx - (width if ends else 0)
        taken.append(
            (
                left - 4,
                at[i][1] + dy - 0.7 * _TEXT_PT,
                left + width + 4,
                at[i][1] + dy + 0.7 * _TEXT_PT,
            )
        )
