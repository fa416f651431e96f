"""What each worker of a run did when, from the files that `optimizer.record()` has written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from distoptim import Span
from distoptim_experiments.report import drawing
from distoptim_experiments.report.page import Picture, Section, html
from distoptim_experiments.report.tables import Table
from distoptim_experiments.training.loop import TIMELINE

# What optimizer.record() writes.
_FORMAT = 1
PNG = "timeline.png"
HTML = "timeline.html"

# Told apart by everybody, in this order from the worker's own time to the network's.
_COLOURS = {
    "step": "#0072B2",
    "wait": "#D55E00",
    "merge": "#009E73",
    "launch": "#009E73",
    "in flight": "#E69F00",
}
_MEANING = {
    "step": "computation",
    "wait": "waiting",
    "merge": "launch, merge",
    "in flight": "mean in flight",
}
_MARKS = {"lost": "x", "catch up": "^", "joined": ">", "left": "<", "lost worker": "X"}


@dataclass
class Lane:
    """One worker.

    Attributes:
        name: its rank, or its own name where workers come and go.
        spans: on the run's clock: seconds since the first one of any worker.
        marks: (seconds, what), of what takes no time.
        zero: what its clock's seconds begin at.
    """

    name: str
    algorithm: str
    zero: float = 0.0
    spans: list[Span] = field(default_factory=list)
    marks: list[tuple[float, str]] = field(default_factory=list)


def read(folder: Path) -> list[Lane]:
    """The workers of a run, by name.

    Args:
        folder: what `record()` was given, or the one that has it as `timeline`.

    Raises:
        ValueError: no file of a worker is there, or a line of one is none.
    """
    paths = sorted(folder.glob("worker-*.jsonl")) or sorted(
        (folder / TIMELINE).glob("worker-*.jsonl")
    )
    if not paths:
        raise ValueError(
            f"{folder}: no worker-*.jsonl in it, as optimizer.record() writes them, and train and "
            "simulate with --timeline"
        )
    lanes = [_lane(path) for path in paths]
    starts = [span.start_s for lane in lanes for span in lane.spans]
    zero = min(starts, default=0.0)
    for lane in lanes:
        lane.spans = [
            s._replace(start_s=s.start_s - zero, end_s=s.end_s - zero) for s in lane.spans
        ]
        lane.marks = [(at - zero, what) for at, what in lane.marks]
    return sorted(lanes, key=lambda lane: (len(lane.name), lane.name))


def _lane(path: Path) -> Lane:
    lane = Lane("", "")
    number = 1
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            _add(lane, json.loads(line))
            number += 1
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}:{number}: not a line of a time line: {error}") from error
    if not lane.name:
        raise ValueError(f"{path}: no first line that says whose it is")
    return lane


def _add(lane: Lane, found: Any) -> None:
    """One line of a file."""
    if isinstance(found, list):
        name, start_s, end_s, step, fragment = found
        lane.spans.append(Span(name, start_s + lane.zero, end_s + lane.zero, step, fragment))
        if name in _MARKS:
            lane.marks.append((start_s + lane.zero, name))
    elif "format" in found:
        if found["format"] != _FORMAT:
            raise ValueError(f"format={found['format']}: allowed is {_FORMAT}")
        lane.name = found["worker"]
        lane.algorithm = found["algorithm"]
        lane.zero = found["zero"]
    else:
        what = "lost worker" if found["what"] == "lost" else found["what"]
        lane.marks.append((found["time"], what))


def write(lanes: Sequence[Lane], out: Path, *, seconds: tuple[float, float] | None = None) -> None:
    """Draw them, as one PNG and as one HTML page that asks for nothing else.

    Args:
        lanes: a row each.
        out: the folder for both.
        seconds: first and last one that are shown; None: all.

    Raises:
        ValueError: nothing happened between them; the folder cannot be written to.
    """
    last = max((s.end_s for lane in lanes for s in lane.spans), default=0.0)
    first, end = seconds or (0.0, last)
    if not 0 <= first < min(end, last):
        raise ValueError(f"seconds={first:g}:{end:g}: allowed is a part of 0:{last:g}")
    picture = drawing.png(
        lambda axes: _draw(axes[0][0], lanes, first, min(end, last)),
        1,
        1,
        height=0.8 + 0.55 * len(lanes),
        width=drawing.WIDTH,
    )
    title = f"{lanes[0].algorithm}: what {len(lanes)} workers did when"
    shown = Picture(TIMELINE, f"seconds {first:g} to {min(end, last):g}", picture)
    page = html(title, [Section("Time line", [shown]), Section("In all", [_totals(lanes)])])
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / PNG).write_bytes(picture)
        (out / HTML).write_text(page, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{error.filename or out}: {error.strerror}") from error


def _draw(axes: Any, lanes: Sequence[Lane], first: float, last: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    used = set()
    for row, lane in enumerate(lanes):
        for name, colour in _COLOURS.items():
            bars = [
                (s.start_s, s.end_s - s.start_s)
                for s in lane.spans
                if s.name == name and s.end_s >= first and s.start_s <= last
            ]
            # The network is a thinner bar below the worker's own.
            place = (row + 0.22, 0.2) if name == "in flight" else (row - 0.28, 0.46)
            thin = len(bars) > 400
            axes.broken_barh(
                bars, place, facecolors=colour, edgecolor=colour if thin else "white", linewidth=0.4
            )
        for at, what in lane.marks:
            if what in _MARKS and first <= at <= last:
                used.add(what)
                axes.plot(at, row - 0.05, _MARKS[what], color="black", markersize=7)
    axes.set_yticks(range(len(lanes)), [f"worker {lane.name}" for lane in lanes])
    axes.set_ylim(len(lanes) - 0.4, -0.5)
    axes.set_xlim(first, last)
    axes.set_xlabel("seconds")
    axes.tick_params(axis="y", length=0)
    patches = [Patch(color=_COLOURS[name], label=label) for name, label in _MEANING.items()]
    marks = [
        Line2D([], [], marker=_MARKS[w], color="black", linestyle="none", label=w)
        for w in sorted(used)
    ]
    drawing.legend([[axes]], [*patches, *marks])


def _totals(lanes: Sequence[Lane]) -> Table:
    columns = ["worker", "local steps", "computation, s", "waiting, s", "launch and merge, s"]
    columns += ["in flight, s", "merges", "lost"]
    rows = [list(_row(lane)) for lane in lanes]
    texts = pd.DataFrame(rows, columns=columns)
    return Table("Sums of the whole run", texts, pd.DataFrame())


def _row(lane: Lane) -> Iterator[str]:
    def seconds(*names: str) -> str:
        return f"{sum(s.end_s - s.start_s for s in lane.spans if s.name in names):.2f}"

    def count(name: str) -> str:
        return str(sum(s.name == name for s in lane.spans))

    yield lane.name
    yield str(max((s.step for s in lane.spans), default=0))
    yield seconds("step")
    yield seconds("wait")
    yield seconds("launch", "merge")
    yield seconds("in flight")
    yield count("merge")
    yield count("lost")
