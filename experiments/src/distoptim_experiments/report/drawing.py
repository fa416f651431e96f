"""How the pictures of a report look: SVG whose text takes the colour of the page around it."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distoptim_experiments.report.figure import COLOURS, MARKERS

GREY = "#7f7f7f"
HATCHES = ("", "////", "xxxx", "....")
# Stands for the page's own colour of text while matplotlib draws.
_TEXT = "#010203"
_WIDTH = 11.0
_LINES: Any = ("-", "--", "-.", (0, (4, 1, 1, 1, 1, 1)))
_STYLE = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "svg.fonttype": "none",
    "hatch.linewidth": 0.8,
    "axes.axisbelow": True,
    "svg.hashsalt": "report",
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _TEXT
    ),
}


def colour(i: int) -> str:
    """Of the method with this number; black is the page's colour of text."""
    return COLOURS[i % len(COLOURS)] if i % len(COLOURS) else _TEXT


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
    """A legend of methods, label -> number, and of sizes of markers."""
    from matplotlib.lines import Line2D

    methods = [Line2D([], [], **look(i), label=name) for name, i in styles.items()]
    _legend(
        axes,
        methods
        + [
            Line2D([], [], color=GREY, marker="o", linestyle="none", markersize=size, label=name)
            for name, size in (sizes or {}).items()
        ],
    )


def parts(axes: Any, labels: Sequence[str]) -> None:
    """A legend of the parts of bars."""
    from matplotlib.patches import Patch

    _legend(
        axes,
        [
            Patch(facecolor="none" if k else GREY, edgecolor=GREY, hatch=HATCHES[k], label=label)
            for k, label in enumerate(labels)
        ],
    )


def _legend(axes: Any, handles: Sequence[Any]) -> None:
    """Above the panels, in as many columns as fit."""
    figure = axes[0][0].figure
    for columns in range(min(6, len(handles)), 0, -1):
        legend = figure.legend(
            handles=handles,
            loc="outside upper left",
            ncols=columns,
            frameon=False,
            handlelength=2.6,
        )
        if (
            columns == 1
            or legend.get_window_extent(figure.canvas.get_renderer()).width <= figure.bbox.width
        ):
            return
        legend.remove()


def heights(axes: Any) -> None:
    """Logarithmic, with ticks in plain figures, where the values differ by more than a factor."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    limits = [axis.dataLim for axis in axes.flat if math.isfinite(axis.dataLim.y1)]
    low, high = (
        min((box.y0 for box in limits), default=0.0),
        max((box.y1 for box in limits), default=0.0),
    )
    if low <= 0 or high < 4 * low:
        return
    for axis in axes.flat:
        axis.set_yscale("log")
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5, 7)))
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.yaxis.set_minor_formatter(FormatStrFormatter("%g"))


def svg(
    fill: Callable[[Any], None], rows: int, columns: int, *, height: float, share: bool = False
) -> str:
    """An SVG element of panels.

    Args:
        fill: draws into the axes, [rows][columns].
        rows, columns: how many panels.
        height: of a row, in inches.
        share: all panels have the same axes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(_STYLE):  # type: ignore[arg-type]  # its stubs want literal keys
        width = min(_WIDTH, 4.0 + 3.5 * columns)
        figure, axes = plt.subplots(
            rows,
            columns,
            figsize=(width, 0.5 + height * rows),
            layout="constrained",
            squeeze=False,
            sharex=share,
            sharey=share,
        )
        fill(axes)
        out = io.StringIO()
        figure.savefig(
            out,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
        )
        plt.close(figure)
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # The page shows all pictures at one scale.
    text = text.replace("<svg", f'<svg role="img" style="--inches: {width:g}"', 1)
    # Text without a colour of its own would be black on a dark page.
    return text.replace(_TEXT, "currentColor")
