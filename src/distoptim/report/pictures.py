"""The pictures of a report, as SVG whose text takes the colour of the page around it."""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distoptim.report import runs as grid
from distoptim.report.figure import COLOURS, MARKERS
from distoptim.report.runs import Run

# Stands for the page's own colour of text while matplotlib draws.
_TEXT = "#010203"
_GREY = "#7f7f7f"
_WIDTH = 11.0
_HATCHES = ("", "////", "xxxx", "....")
_LINES: Any = ("-", "--", "-.", (0, (1, 1)))
_STYLE = {"font.size": 10, "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False,
          "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "svg.fonttype": "none",
          "hatch.linewidth": 0.8, "axes.axisbelow": True, "svg.hashsalt": "report",
          **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _TEXT)}


def losses(runs: Sequence[Run], against: str, label: str) -> str:
    """Training loss, one panel per partition and tau: the mean over seeds, dotted to a cross if all seeds diverged.

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
                axis.set_title(_title(partition if len(rows) > 1 else "", f"tau {tau}"))
                shown = grid.at([run for run in runs if run.partition == partition], tau)
                for name, group in grid.by(shown, lambda run: run.label).items():
                    _curve(axis, group, against, grid.labels(runs).index(name))
                axis.grid(color=_GREY, alpha=0.25)
                axis.set_xlim(left=0)
            axes[i][0].set_ylabel("training loss")
        for axis in axes[-1]:
            axis.set_xlabel(label)
        _heights(axes)
        _names(axes, grid.labels(runs))

    return _svg(fill, len(rows), len(columns), height=2.9, share=True)


def _heights(axes: Any) -> None:
    """Logarithmic, with ticks in plain figures, where the values differ by more than a factor."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    limits = [axis.dataLim for axis in axes.flat if math.isfinite(axis.dataLim.y1)]
    low, high = min((box.y0 for box in limits), default=0.0), max((box.y1 for box in limits), default=0.0)
    if low <= 0 or high < 4 * low:
        return
    for axis in axes.flat:
        axis.set_yscale("log")
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5, 7)))
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.yaxis.set_minor_formatter(FormatStrFormatter("%g"))


def _curve(axis: Any, group: Sequence[Run], against: str, i: int) -> None:
    sound = [run for run in group if not run.diverged]
    steps = grid.by([line for run in sound or group for line in run.record.logs if math.isfinite(line["loss"])],
                    lambda line: line["step"])
    points = [(statistics.fmean(line[against] for line in lines), statistics.fmean(line["loss"] for line in lines))
              for _, lines in sorted(steps.items()) if len(lines) == len(sound or lines)]
    if points:
        xs, ys = zip(*points, strict=True)
        axis.plot(xs, ys, color=_colour(i), linestyle=_LINES[i % len(_LINES)] if sound else ":", linewidth=1.5,
                  marker=_marker(i), markersize=5, markevery=(i % 3, max(1, len(xs) // 5)))
        if not sound:
            axis.plot(xs[-1], ys[-1], "x", color=_colour(i), markersize=9, markeredgewidth=2)


def front(runs: Sequence[Run], label: str) -> str:
    """Test error against seconds, a panel per partition, a line per method, its points labelled with tau."""
    columns = grid.partitions(runs)

    def fill(axes: Any) -> None:
        for axis, partition in zip(axes[0], columns, strict=True):
            axis.set_title(_title(partition))
            for i, name in enumerate(grid.labels(runs)):
                points = _means([run for run in runs if run.label == name and run.partition == partition])
                axis.plot([x for _, x, _ in points], [y for _, _, y in points], color=_colour(i), marker=_marker(i),
                          linestyle=_LINES[i % len(_LINES)], linewidth=1.3, markersize=7)
                for tau, x, y in points:
                    # Neighbours' numbers lie on different sides of their points.
                    axis.annotate("" if tau is None else str(tau), (x, y), (-6 if i % 2 else 6, 3), fontsize=8.5,
                                  textcoords="offset points", ha="right" if i % 2 else "left")
            axis.set_xlabel(f"{label} of the whole run")
            axis.grid(color=_GREY, alpha=0.25)
            axis.margins(0.08)
            _heights(axes[:, [columns.index(partition)]])
        axes[0][0].set_ylabel("test error, %")
        _names(axes, grid.labels(runs))

    return _svg(fill, 1, len(columns), height=4.2)


def _means(runs: Sequence[Run]) -> list[tuple[int | None, float, float]]:
    """(tau, mean seconds, mean test error in per cent) of the periods at which no seed diverged."""
    out: list[tuple[int | None, float, float]] = []
    for tau, group in grid.by(runs, lambda run: run.tau).items():
        errors = [100 * (1 - v) for run in group if (v := run.value("test_accuracy")) is not None]
        if errors and not any(run.diverged for run in group):
            seconds = statistics.fmean(run.summary["seconds"] for run in group)
            out.append((None if group[0].synchronous else tau, seconds, statistics.fmean(errors)))
    return out


def times(runs: Sequence[Run]) -> str:
    """Milliseconds per local step of computation and of exposed communication, a panel per tau."""
    def parts(group: Sequence[Run]) -> dict[str, float]:
        return {"computation": _per_step(group, "computation_s"),
                "exposed communication": _per_step(group, "exposed_s")}

    def told(values: Mapping[str, float]) -> str:
        return f"{values['exposed communication'] / values['computation']:.1%}"

    return _bars(runs, grid.labels(runs), parts, told, stacked=True,
                 label="ms per local step (%: exposed of computation)")


def stragglers(runs: Sequence[Run]) -> str:
    """Milliseconds per local step without and with random slow-downs, a panel per tau; of what was run with them."""
    slowed = {(run.label, run.tau) for run in runs if run.slowdown != "none"}
    order = grid.labels(runs)
    runs = [run for run in runs if (run.label, run.tau) in slowed]
    kinds = sorted({run.slowdown for run in runs}, key=lambda kind: (kind != "none", kind))

    def parts(group: Sequence[Run]) -> dict[str, float]:
        return {("no slow-downs" if kind == "none" else kind): _per_step([r for r in group if r.slowdown == kind],
                                                                         "seconds") for kind in kinds}

    return _bars(runs, order, parts, lambda values: "", stacked=False, label="ms per local step")


def _per_step(group: Sequence[Run], name: str) -> float:
    """Over the runs that did not diverge, if there are some: the others ended early."""
    counted = [run for run in group if not run.diverged] or group
    return statistics.fmean(1e3 * r.summary[name] / max(1, r.summary["step"]) for r in counted) if counted else math.nan


def _bars(runs: Sequence[Run], order: Sequence[str], parts: Callable[[Sequence[Run]], Mapping[str, float]],
          told: Callable[[Mapping[str, float]], str], *, stacked: bool, label: str) -> str:
    """Horizontal bars, a row per method: parts one after the other, or one below the other; colours by `order`."""
    names, columns = grid.labels(runs), grid.taus(runs)

    def fill(axes: Any) -> None:
        for axis, tau in zip(axes[0], columns, strict=True):
            axis.set_title(_title(f"tau {tau}"))
            for y, group in ((names.index(n), g) for n, g in grid.by(grid.at(runs, tau), lambda r: r.label).items()):
                values, colour = parts(group), _colour(order.index(names[y]))
                left, height = 0.0, 0.62 if stacked else 0.8 / len(values)
                for k, value in enumerate(values.values()):
                    place = y if stacked else y + (k - (len(values) - 1) / 2) * height
                    axis.barh(place, value, left=left, height=height, edgecolor=colour, hatch=_HATCHES[k],
                              facecolor="none" if k else colour, linewidth=1)
                    left += value if stacked else 0
                axis.annotate(told(values), (left, y), (3, 0), textcoords="offset points", va="center", fontsize=8)
            axis.set_yticks(range(len(names)), names)
            axis.tick_params(axis="y", length=0)
            axis.set_xlabel("")
            axis.margins(x=0.25 if stacked else 0.05)
        axes[0][0].invert_yaxis()
        axes[0][0].figure.supxlabel(label, fontsize=10)
        _key(axes, list(parts([runs[0]])))

    return _svg(fill, 1, len(columns), height=1.2 + (0.34 if stacked else 0.5) * len(names), share=True)


def _title(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _names(axes: Any, names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=_colour(i), marker=_marker(i), linestyle=_LINES[i % len(_LINES)], label=name)
               for i, name in enumerate(names)]
    _legend(axes, handles)


def _key(axes: Any, names: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    _legend(axes, [Patch(facecolor="none" if k else _GREY, edgecolor=_GREY, hatch=_HATCHES[k], label=name)
                   for k, name in enumerate(names)])


def _legend(axes: Any, handles: Sequence[Any]) -> None:
    axes[0][0].figure.legend(handles=handles, loc="outside upper left", ncols=min(6, len(handles)), frameon=False,
                             handlelength=2.6)


def _svg(fill: Callable[[Any], None], rows: int, columns: int, *, height: float, share: bool = False) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(_STYLE):  # type: ignore[arg-type]
        width = min(_WIDTH, 2.5 + 3.5 * columns)
        figure, axes = plt.subplots(rows, columns, figsize=(width, 0.5 + height * rows), layout="constrained",
                                    squeeze=False, sharex=share, sharey=share)
        fill(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True,
                       metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        plt.close(figure)
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg"):], flags=re.DOTALL)
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img"', text, count=1)
    # Text without a colour of its own would be black on a dark page.
    return text.replace(_TEXT, "currentColor")


def _colour(i: int) -> str:
    """Black is the page's colour of text."""
    return COLOURS[i % len(COLOURS)] if i % len(COLOURS) else _TEXT


def _marker(i: int) -> str:
    """Colours come again after eight methods, with other markers."""
    return MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]
