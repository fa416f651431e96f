"""How the pictures of a report look."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distoptim_experiments.report.figure import COLOURS, MARKERS

GREY = "#7f7f7f"
WIDTH = 11.0
_LINES: Any = ("-", "--", "-.", (0, (4, 1, 1, 1, 1, 1)))
_STYLE: Any = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "hatch.linewidth": 0.8,
    "axes.axisbelow": True,
}


def colour(i: int) -> str:
    """Of the method with this number."""
    return COLOURS[i % len(COLOURS)]


def look(i: int) -> dict[str, Any]:
    """Colour, marker and kind of line of a method.

    Colours come again after eight methods, with other markers.
    """
    return {
        "color": colour(i),
        "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)],
        "linestyle": _LINES[i % len(_LINES)],
    }


def names(axes: Any, styles: Mapping[str, int], sizes: Mapping[str, float] | None = None) -> None:
    """A legend of methods, name -> number, and of sizes of markers."""
    from matplotlib.lines import Line2D

    methods = [Line2D([], [], **look(i), label=name) for name, i in styles.items()]
    dots = [
        Line2D([], [], color=GREY, marker="o", linestyle="none", markersize=size, label=name)
        for name, size in (sizes or {}).items()
    ]
    legend(axes, [*methods, *dots])


def legend(axes: Any, handles: Sequence[Any]) -> None:
    """Above the panels, in as many columns as fit."""
    figure = axes[0][0].figure
    for columns in range(min(6, len(handles)), 0, -1):
        made = figure.legend(
            handles=handles,
            loc="outside upper left",
            ncols=columns,
            frameon=False,
            handlelength=2.6,
        )
        width = made.get_window_extent(figure.canvas.get_renderer()).width
        if columns == 1 or width <= figure.bbox.width:
            return
        made.remove()


def heights(axes: Any) -> None:
    """Logarithmic, with ticks in plain figures, where the values differ by more than a factor."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    limits = [axis.dataLim for axis in axes.flat if math.isfinite(axis.dataLim.y1)]
    low = min((box.y0 for box in limits), default=0.0)
    high = max((box.y1 for box in limits), default=0.0)
    if low <= 0 or high < 4 * low:
        return
    for axis in axes.flat:
        axis.set_yscale("log")
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5, 7)))
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.yaxis.set_minor_formatter(FormatStrFormatter("%g"))


def png(
    fill: Callable[[Any], None],
    rows: int,
    columns: int,
    *,
    height: float,
    width: float | None = None,
    share: bool = False,
) -> bytes:
    """A PNG of panels.

    Args:
        fill: draws into the axes, [rows][columns].
        rows, columns: how many panels.
        height: of a row, in inches.
        width: of all, in inches; None: as the columns need.
        share: all panels have the same axes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            rows,
            columns,
            figsize=(width or min(WIDTH, 4.0 + 3.5 * columns), 0.5 + height * rows),
            layout="constrained",
            squeeze=False,
            sharex=share,
            sharey=share,
        )
        fill(axes)
        out = io.BytesIO()
        # No version of matplotlib in the file: the same runs give the same bytes.
        figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
        plt.close(figure)
    return out.getvalue()
