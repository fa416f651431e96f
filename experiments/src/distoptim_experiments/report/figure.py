"""The picture of a comparison: training loss against time, and where the time went."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distoptim_experiments.records import Record

# Okabe & Ito, told apart by everybody; black first, for the method that all others are compared
# with.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#8C8C8C")
MARKERS = "osD^vPX*"
PARTS = {
    "computation": ("", ""),
    "overhead": ("white", "...."),
    "exposed communication": ("white", "////"),
}
"""Of a bar of time: face colour, where it is not the method's, and hatch."""


def draw(runs: Sequence[Record], path: Path) -> None:
    """Write the picture of finished runs as PNG.

    Left, the loss of rank 0's batches, smoothed; right, where the seconds went.

    Args:
        runs: in the order in which they are to be shown, synchronous SGD first.
        path: of the file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with plt.rc_context(
        {
            "font.size": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 12,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
        }
    ):
        figure, (left, right) = plt.subplots(
            1,
            2,
            figsize=(12.8, 4.8),
            width_ratios=(1.3, 1),
            layout=ConstrainedLayoutEngine(wspace=0.06),
        )
        _losses(left, runs)
        _bars(right, runs)
        figure.supxlabel(_caption(runs[0]), fontsize=9.5, color="0.35", x=0.01, ha="left")
        save(figure, path, dpi=150)
        plt.close(figure)


def _losses(axes: Any, runs: Sequence[Record]) -> None:
    for i, run in enumerate(runs):
        seconds = [line.seconds for line in run.logs]
        axes.plot(
            seconds,
            smooth([line.loss for line in run.logs]),
            _marker(i),
            linestyle="-",
            markevery=[-1],
            markersize=8,
            markeredgecolor="white",
            color=_colour(i),
            linewidth=1.8,
            solid_joinstyle="round",
            label=run.config.algorithm,
        )
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.set_title("Training loss", pad=30)
    axes.text(
        0,
        1.04,
        "of rank 0's batches, smoothed; all methods make the same number of steps",
        fontsize=10,
        color="0.35",
        transform=axes.transAxes,
    )
    axes.set_xlabel("training time, seconds")
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    axes.legend(loc="upper right", frameon=False, fontsize=10)


def _bars(axes: Any, runs: Sequence[Record]) -> None:
    summaries = [run.summary for run in runs if run.summary is not None]
    longest = max(s.seconds for s in summaries)
    for y, s in enumerate(summaries):
        left = 0.0
        seconds = (s.computation_s, s.overhead_s or 0.0, s.exposed_s)
        for value, (face, hatch) in zip(seconds, PARTS.values(), strict=True):
            axes.barh(
                y,
                value,
                left=left,
                color=face or _colour(y),
                edgecolor=_colour(y),
                hatch=hatch,
                linewidth=1.2,
                height=0.6,
            )
            left += value
        axes.text(s.seconds + longest * 0.02, y, f"{s.exposed_share:.0%}", va="center")
    axes.set_yticks(range(len(runs)), [run.config.algorithm for run in runs])
    for i, label in enumerate(axes.get_yticklabels()):
        label.set_color(_colour(i))
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.13)
    axes.set_xlabel("training time, seconds (%: exposed / computation)")
    axes.set_title("Where the time goes", pad=30)
    _legend(axes)


def _legend(axes: Any) -> None:
    """Between title and bars, where there is no data."""
    from matplotlib.patches import Patch

    grey = "0.45"
    axes.legend(
        handles=[
            Patch(facecolor=face or grey, edgecolor=grey, hatch=hatch, label=label)
            for label, (face, hatch) in PARTS.items()
        ],
        loc="lower left",
        bbox_to_anchor=(-0.01, 0.985),
        ncols=3,
        frameon=False,
        borderpad=0,
        columnspacing=1.5,
        fontsize=10,
        handlelength=1.6,
    )


def save(figure: Any, path: Path, *, dpi: int) -> None:
    """Write a picture in the format that its suffix names, PNG without one.

    Raises:
        ValueError: naming the file, if it cannot be written, or there is no such format.
    """
    kind = path.suffix.removeprefix(".").lower() or "png"
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise ValueError(f"{path}: allowed are the suffixes {', '.join(sorted(known))}")
    made = io.BytesIO()
    # Given a path, matplotlib appends ".png" where there is no suffix, and names no file in an error.
    figure.savefig(made, format=kind, dpi=dpi)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(made.getvalue())
    except OSError as error:
        raise ValueError(f"{error.filename or path}: {error.strerror}") from error


def smooth(values: Sequence[float], weight: float = 0.3) -> list[float]:
    """Exponential moving average; the newest value counts `weight`, in (0, 1]."""
    out: list[float] = []
    for value in values:
        out.append(value if not out else (1 - weight) * out[-1] + weight * value)
    return out


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _marker(i: int) -> str:
    return MARKERS[i % len(MARKERS)]


def _caption(run: Record) -> str:
    c = run.config
    machine = run.start.surroundings.machine
    link = []
    if c.latency_ms is not None:
        link.append(f"{c.latency_ms:g} ms")
    if c.bandwidth_gbit_s is not None:
        link.append(f"{c.bandwidth_gbit_s:g} Gbit/s")
    over = f" over an emulated link of {' and '.join(link)}" if link else ""
    return (
        f"{c.model} on {c.data}, {c.workers} workers{over}; batch {c.batch_size} each, "
        f"tau {c.tau}, learning rate {c.lr:g}. {machine.cores} cores of {machine.processor}."
    )
