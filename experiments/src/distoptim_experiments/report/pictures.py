"""The pictures of a report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distoptim_experiments.report import drawing
from distoptim_experiments.report import runs as grid
from distoptim_experiments.report.runs import Run


def losses(runs: Sequence[Run], against: str, label: str) -> str:
    """Training loss, one panel per partition and tau: the mean over seeds, dotted to a cross if all
    seeds diverged.

    Args:
        runs: those to be compared.
        against: "epoch" or "seconds", a figure of the log lines.
        label: of the horizontal axis.
    """
    rows, columns = grid.partitions(runs), grid.taus(runs)

    def fill(axes: Any) -> None:
        for i, partition in enumerate(rows):
            for k, tau in enumerate(columns):
                axis = axes[i][k]
                axis.set_title(f"{partition}, tau {tau}" if len(rows) > 1 else f"tau {tau}")
                shown = grid.at([run for run in runs if run.partition == partition], tau)
                for group in grid.by(shown, lambda run: run.label).values():
                    _curve(axis, group, against)
                axis.grid(color=drawing.GREY, alpha=0.25)
                axis.set_xlim(left=0)
            axes[i][0].set_ylabel("training loss")
        for axis in axes[-1]:
            axis.set_xlabel(label)
        drawing.heights(axes)
        drawing.names(axes, grid.labels(runs))

    return drawing.svg(fill, len(rows), len(columns), height=2.9, share=True)


def _curve(axis: Any, group: Sequence[Run], against: str) -> None:
    sound = [run for run in group if not run.diverged]
    steps = grid.by(
        [line for run in sound or group for line in run.record.logs if math.isfinite(line.loss)],
        lambda line: line.step,
    )
    points = [
        (
            statistics.fmean(getattr(line, against) for line in lines),
            statistics.fmean(line.loss for line in lines),
        )
        for _, lines in sorted(steps.items())
        if len(lines) == len(sound or lines)
    ]
    if points:
        i, (xs, ys) = group[0].style, zip(*points, strict=True)
        look = {**drawing.look(i), **({} if sound else {"linestyle": ":"})}
        axis.plot(
            xs, ys, **look, linewidth=1.5, markersize=5, markevery=(i % 3, max(1, len(xs) // 5))
        )
        if not sound:
            axis.plot(xs[-1], ys[-1], "x", color=drawing.colour(i), markersize=9, markeredgewidth=2)


def times(runs: Sequence[Run]) -> str:
    """Milliseconds per local step of computation and of exposed communication, a panel per tau."""

    def parts(group: Sequence[Run]) -> dict[str, float]:
        return {
            "computation": _per_step(group, "computation_s"),
            "exposed communication": _per_step(group, "exposed_s"),
        }

    def told(values: Sequence[float]) -> list[str]:
        computation, exposed = values
        return ["", f"{exposed / computation:.1%}" if computation else ""]

    return _bars(
        runs, parts, told, stacked=True, label="ms per local step (%: exposed of computation)"
    )


def stragglers(runs: Sequence[Run]) -> str:
    """Milliseconds per local step without and with random slow-downs, a panel per tau.

    Of what was run with them.
    """
    slowed = {(run.label, run.tau) for run in runs if run.slowdown != "none"}
    runs = [run for run in runs if (run.label, run.tau) in slowed]
    kinds = sorted({run.slowdown for run in runs}, key=lambda kind: (kind != "none", kind))

    def parts(group: Sequence[Run]) -> dict[str, float]:
        return {
            ("no slow-downs" if kind == "none" else kind): _per_step(
                [r for r in group if r.slowdown == kind], "seconds"
            )
            for kind in kinds
        }

    def told(values: Sequence[float]) -> list[str]:
        return ["" if math.isnan(value) else f"{value:.3g}" for value in values]

    return _bars(runs, parts, told, stacked=False, label="ms per local step")


def _per_step(group: Sequence[Run], name: str) -> float:
    """Over the runs that did not diverge, if there are some: the others ended early."""
    counted = [run for run in group if not run.diverged] or group
    return (
        statistics.fmean(1e3 * getattr(r.summary, name) / max(1, r.summary.step) for r in counted)
        if counted
        else math.nan
    )


def _bars(
    runs: Sequence[Run],
    parts: Callable[[Sequence[Run]], Mapping[str, float]],
    told: Callable[[Sequence[float]], list[str]],
    *,
    stacked: bool,
    label: str,
) -> str:
    """Horizontal bars, a row per method: parts one after the other, or one below the other.

    Texts at their ends.
    """
    names, columns = list(grid.labels(runs)), grid.taus(runs)

    def fill(axes: Any) -> None:
        for axis, tau in zip(axes[0], columns, strict=True):
            axis.set_title(f"tau {tau}")
            for name, group in grid.by(grid.at(runs, tau), lambda run: run.label).items():
                y, values, colour = (
                    names.index(name),
                    list(parts(group).values()),
                    drawing.colour(group[0].style),
                )
                left, height = 0.0, 0.62 if stacked else 0.8 / len(values)
                for k, (value, text) in enumerate(zip(values, told(values), strict=True)):
                    place = y if stacked else y + (k - (len(values) - 1) / 2) * height
                    axis.barh(
                        place,
                        value,
                        left=left,
                        height=height,
                        edgecolor=colour,
                        hatch=drawing.HATCHES[k],
                        facecolor="none" if k else colour,
                        linewidth=1,
                    )
                    if text:
                        axis.annotate(
                            text,
                            (left + value, place),
                            (3, 0),
                            textcoords="offset points",
                            va="center",
                            fontsize=8,
                        )
                    left += value if stacked else 0
            axis.set_yticks(range(len(names)), names)
            axis.tick_params(axis="y", length=0)
            axis.margins(x=0.25 if stacked else 0.16)
        axes[0][0].invert_yaxis()
        axes[0][0].figure.supxlabel(label, fontsize=10)
        drawing.parts(axes, list(parts([runs[0]])))

    return drawing.svg(
        fill, 1, len(columns), height=1.2 + (0.34 if stacked else 0.55) * len(names), share=True
    )
