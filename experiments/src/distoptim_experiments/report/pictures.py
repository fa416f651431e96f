"""The pictures of a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from distoptim_experiments.report import drawing
from distoptim_experiments.report import runs as reported
from distoptim_experiments.report.figure import PARTS

_TIMES = dict(zip(PARTS, ("computation_s", "overhead_s", "exposed_s"), strict=True))
_SLOW = {0: ("", ""), 1: ("white", "////"), 2: ("white", "xxxx"), 3: ("white", "....")}
"""Faces and hatches of the kinds of slow-downs, as those of `PARTS`."""


def losses(runs: pd.DataFrame, curves: pd.DataFrame, against: str, label: str) -> bytes:
    """Training loss, one panel per partition and tau: the mean over seeds, dotted to a cross if all
    seeds diverged.

    Args:
        runs: those to be compared.
        curves: their logged losses.
        against: "epoch" or "seconds".
        label: of the horizontal axis.
    """
    rows = reported.partitions(runs)
    columns = reported.taus(runs)
    finite = curves[np.isfinite(curves.loss)]

    def fill(axes: Any) -> None:
        for i, partition in enumerate(rows):
            for axis, tau in zip(axes[i], columns, strict=True):
                axis.set_title(f"{partition}, tau {tau}" if len(rows) > 1 else f"tau {tau}")
                shown = reported.at(runs[runs.partition == partition], tau)
                for _, group in shown.groupby("name", sort=False):
                    _curve(axis, group, finite, against)
                axis.grid(color=drawing.GREY, alpha=0.25)
                axis.set_xlim(left=0)
            axes[i][0].set_ylabel("training loss")
        for axis in axes[-1]:
            axis.set_xlabel(label)
        drawing.heights(axes)
        drawing.names(axes, reported.styles(runs))

    return drawing.png(fill, len(rows), len(columns), height=2.9, share=True)


def _curve(axis: Any, group: pd.DataFrame, curves: pd.DataFrame, against: str) -> None:
    sound = group[~group.diverged]
    whole = len(sound) > 0
    steps = curves[curves.run.isin((sound if whole else group).run)].groupby("step")
    means = steps[[against, "loss"]].mean()
    if whole:
        # Steps that some seeds have not logged would make the mean jump.
        means = means[steps.size() == len(sound)]
    if means.empty:
        return
    i = int(group["style"].iloc[0])
    look = {**drawing.look(i), **({} if whole else {"linestyle": ":"})}
    every = (i % 3, max(1, len(means) // 5))
    axis.plot(means[against], means.loss, **look, linewidth=1.5, markersize=5, markevery=every)
    if not whole:
        axis.plot(*means.iloc[-1], "x", color=drawing.colour(i), markersize=9, markeredgewidth=2)


def times(runs: pd.DataFrame) -> bytes:
    """Milliseconds per local step of computation, overhead and exposed communication, a panel per
    tau."""

    def parts(group: pd.DataFrame) -> dict[str, float]:
        return {part: _per_step(group, name) for part, name in _TIMES.items()}

    def told(values: Sequence[float]) -> list[str]:
        computation, _, exposed = values
        return ["", "", f"{exposed / computation:.1%}" if computation else ""]

    label = "ms per local step (%: exposed of computation)"
    return _bars(runs, parts, told, looks=list(PARTS.values()), stacked=True, label=label)


def stragglers(runs: pd.DataFrame) -> bytes:
    """Milliseconds per local step without and with random slow-downs, a panel per tau.

    Of what was run with them.
    """
    slowed = runs[runs.slowdown != "none"]
    runs = runs[runs.set_index(["name", "tau"]).index.isin(slowed.set_index(["name", "tau"]).index)]
    kinds = sorted(runs.slowdown.unique(), key=lambda kind: (kind != "none", kind))

    def parts(group: pd.DataFrame) -> dict[str, float]:
        return {
            "no slow-downs" if kind == "none" else kind: _per_step(
                group[group.slowdown == kind], "seconds"
            )
            for kind in kinds
        }

    def told(values: Sequence[float]) -> list[str]:
        return ["" if math.isnan(value) else f"{value:.3g}" for value in values]

    looks = [_SLOW[k % len(_SLOW)] for k in range(len(kinds))]
    return _bars(runs, parts, told, looks=looks, stacked=False, label="ms per local step")


def _per_step(group: pd.DataFrame, name: str) -> float:
    """Over the runs that did not diverge, if there are some: the others ended early."""
    sound = group[~group.diverged]
    counted = sound if len(sound) else group
    # What is not measured apart is nothing here.
    return float((1e3 * counted[name].fillna(0.0) / counted.step.clip(lower=1)).mean())


def _bars(
    runs: pd.DataFrame,
    parts: Callable[[pd.DataFrame], Mapping[str, float]],
    told: Callable[[Sequence[float]], list[str]],
    *,
    looks: Sequence[tuple[str, str]],
    stacked: bool,
    label: str,
) -> bytes:
    """Horizontal bars, a row per method: parts one after the other, or one below the other.

    Texts at their ends.
    """
    from matplotlib.patches import Patch

    names = list(reported.styles(runs))
    columns = reported.taus(runs)

    def fill(axes: Any) -> None:
        for axis, tau in zip(axes[0], columns, strict=True):
            axis.set_title(f"tau {tau}")
            for name, group in reported.at(runs, tau).groupby("name", sort=False):
                values = list(parts(group).values())
                colour = drawing.colour(int(group["style"].iloc[0]))
                _bar(axis, names.index(name), values, told(values), looks, colour, stacked=stacked)
            axis.set_yticks(range(len(names)), names)
            axis.tick_params(axis="y", length=0)
            axis.margins(x=0.25 if stacked else 0.16)
        axes[0][0].invert_yaxis()
        axes[0][0].figure.supxlabel(label, fontsize=10)
        said = zip(parts(runs.head(1)), looks, strict=True)
        grey = drawing.GREY
        drawing.legend(
            axes,
            [
                Patch(facecolor=face or grey, edgecolor=grey, hatch=hatch, label=part)
                for part, (face, hatch) in said
            ],
        )

    height = 1.2 + (0.34 if stacked else 0.55) * len(names)
    return drawing.png(fill, 1, len(columns), height=height, share=True)


def _bar(
    axis: Any,
    y: int,
    values: Sequence[float],
    texts: Sequence[str],
    looks: Sequence[tuple[str, str]],
    colour: str,
    *,
    stacked: bool,
) -> None:
    """The parts of one method."""
    left = 0.0
    height = 0.62 if stacked else 0.8 / len(values)
    for k, (value, text, (face, hatch)) in enumerate(zip(values, texts, looks, strict=True)):
        place = y if stacked else y + (k - (len(values) - 1) / 2) * height
        axis.barh(
            place,
            value,
            left=left,
            height=height,
            facecolor=face or colour,
            edgecolor=colour,
            hatch=hatch,
            linewidth=1,
        )
        if text:
            end = (left + value, place)
            axis.annotate(text, end, (3, 0), textcoords="offset points", va="center", fontsize=8)
        left += value if stacked else 0.0
