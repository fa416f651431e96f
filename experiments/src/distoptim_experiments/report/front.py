"""The picture of error against time.

What is on the front is named, all else is told by the legend.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from distoptim_experiments.report import drawing
from distoptim_experiments.report import runs as reported

_SHARE = 1 / 8
_ROOM = 0.4


def front(runs: pd.DataFrame, label: str) -> bytes:
    """Test error against seconds, a panel per partition, a line per method; larger markers for
    longer periods.

    A few points that are far from all others stand at the border, with their values.
    """
    columns = reported.partitions(runs)
    taus = reported.taus(runs)
    sizes = {tau: 6 + 4 * k / max(1, len(taus) - 1) for k, tau in enumerate(taus)}

    def fill(axes: Any) -> None:
        panels = [points(runs[runs.partition == partition]) for partition in columns]
        for k, (axis, shown) in enumerate(zip(axes[0], panels, strict=True)):
            axis.set_title(columns[k])
            axis.set_xlabel(f"{label} of the whole run")
            axis.grid(color=drawing.GREY, alpha=0.25)
            axis.margins(0.12)
            _draw(axis, shown, sizes)
            drawing.heights(axes[:, [k]])
        axes[0][0].set_ylabel("test error, %")
        drawing.names(
            axes, reported.styles(runs), {f"tau {tau}": size for tau, size in sizes.items()}
        )
        # Names are placed on axes that stay as they are.
        axes[0][0].figure.draw_without_rendering()
        for axis, shown in zip(axes[0], panels, strict=True):
            _name(axis, shown)

    return drawing.png(fill, 1, len(columns), height=4.6)


def points(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for every method and period at which no seed diverged.

    Columns: name, tau, style, synchronous; seconds of the whole run and error, the test error in
    per cent, both means; x and y, where it is drawn; beyond, it is at the border instead.
    """
    scored = runs[runs.test_accuracy.notna()]
    made = (
        scored.assign(error=100 * (1 - scored.test_accuracy))
        .groupby(["name", "tau"], sort=False)
        .agg(
            style=("style", "first"),
            synchronous=("synchronous", "first"),
            diverged=("diverged", "any"),
            seconds=("seconds", "mean"),
            error=("error", "mean"),
        )
        .reset_index()
    )
    made = made[~made.diverged]
    made = made.assign(
        x=made.seconds.clip(upper=limit(made.seconds)), y=made.error.clip(upper=limit(made.error))
    )
    return made.assign(beyond=(made.x < made.seconds) | (made.y < made.error))


def best(shown: pd.DataFrame) -> pd.DataFrame:
    """The front, from left to right.

    Points of which none is better in one and at least as good in the other.
    """
    ahead = pd.Series(True, index=shown.index)
    for p in shown.itertuples():
        no_better = (shown.seconds >= p.seconds) & (shown.error >= p.error)
        equal = (shown.seconds == p.seconds) & (shown.error == p.error)
        ahead &= ~no_better | equal
    return shown[ahead].sort_values(["seconds", "error"])


def limit(values: pd.Series[float]) -> float:
    """The largest value that has its place on the axis.

    Up to an eighth of them are beyond it, if they would leave all others less than 0.4 of the axis.
    """
    ordered = [float(value) for value in sorted(values)] or [0.0]
    for beyond in range(1, int(_SHARE * len(ordered)) + 1):
        kept = ordered[:-beyond]
        if 0 < kept[-1] - kept[0] < _ROOM * (ordered[-1] - ordered[0]):
            return kept[-1]
    return ordered[-1]


def _draw(axis: Any, shown: pd.DataFrame, sizes: Mapping[int, float]) -> None:
    """Lines, markers, and the front as a grey stair."""
    for _, group in shown.groupby("name", sort=False):
        look = drawing.look(int(group["style"].iloc[0]))
        near = group[~group.beyond]
        axis.plot(near.x, near.y, **{**look, "marker": None}, linewidth=1.2, alpha=0.45)
        for p in group.itertuples():
            size = 7.5 if p.synchronous else sizes[p.tau]
            # An arrow's head stands for what goes on beyond the border.
            mark = {"marker": ">" if p.x < p.seconds else "^"} if p.beyond else {}
            axis.plot(
                p.x,
                p.y,
                **{**look, **mark},
                markersize=size,
                markeredgewidth=0.6,
                markeredgecolor="white",
            )
    edge = best(shown)
    edge = edge[~edge.beyond]
    axis.step(edge.x, edge.y, where="post", color=drawing.GREY, linewidth=1, alpha=0.7, zorder=1)


def _name(axis: Any, shown: pd.DataFrame) -> None:
    """Write what is said of points beside them, where it covers nothing."""
    from adjustText import adjust_text

    ahead = best(shown)
    said = [(p.x, p.y, _told(p)) for p in ahead[~ahead.beyond].itertuples()]
    for _, group in shown[shown.beyond].groupby("name", sort=False):
        last = group.iloc[-1]
        values = "; ".join(_value(p) for p in group.itertuples())
        said.append((last.x, last.y, f"{last['name']}: {values}"))
    texts = [axis.text(x, y, text, fontsize=8.5) for x, y, text in said]
    if not texts:
        return
    # Nor the grey line.
    corners = _along(axis)
    adjust_text(
        texts,
        x=[*shown.x, *corners[:, 0]],
        y=[*shown.y, *corners[:, 1]],
        ax=axis,
        expand=(1.15, 1.5),
        arrowprops={"arrowstyle": "-", "color": drawing.GREY, "linewidth": 0.7},
    )
    for text in texts:
        text.set_in_layout(False)


def _along(axis: Any) -> NDArray[np.float64]:
    """Points on the last line of a picture, close enough for names to keep off it."""
    line = axis.lines[-1].get_path().interpolated(25)
    return np.asarray(line.vertices)


def _told(p: Any) -> str:
    """Method and period."""
    return str(p.name) if p.synchronous else f"{p.name}, tau {p.tau}"


def _value(p: Any) -> str:
    """Of what is beyond the axes."""
    values = [f"{p.seconds:.0f} s"] * (p.x < p.seconds) + [f"{p.error:.1f} %"] * (p.y < p.error)
    return ", ".join(values) + ("" if p.synchronous else f" (tau {p.tau})")
