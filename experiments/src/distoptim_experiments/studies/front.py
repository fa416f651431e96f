"""Accuracy against bytes and latency: the best of each budget in the study `front`, and two pictures of it.

Run from the repository's root, after more of the study was run:
python -m distoptim_experiments.studies.front
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from distoptim_experiments import frames
from distoptim_experiments.config import SYNCHRONOUS
from distoptim_experiments.models.registry import TEXT_MODELS
from distoptim_experiments.report import drawing

RESULTS = Path("results/front")
LATENCIES = (1, 2, 8)
"""Local steps that a message takes; means have to be as many late."""

BUDGETS = {"1/8": 1 / 7.5, "1/27": 1 / 27, "1/100": 1 / 98, "1/400": 1 / 390}
"""Of DDP's bytes, as named and what may be sent at most."""

_TASK = ["model", "partition", "step"]
_METHOD = ["label", "algorithm", "tau", "options", "lr"]
_MARKS = {0: "$w$", 1: "o", 2: "^", 4: "D", 8: "s"}


def tasks(runs: pd.DataFrame) -> list[tuple[str, str, int]]:
    """Model, partition and local steps, those with DDP's runs alone."""
    synchronous = runs[runs.algorithm == SYNCHRONOUS]
    return [(str(m), str(p), int(s)) for m, p, s in synchronous[_TASK].drop_duplicates().values]


def name(task: tuple[str, str, int]) -> str:
    """Of a task, for tables."""
    model, partition, step = task
    what = "plays" if model in TEXT_MODELS else {"iid": "IID"}.get(partition, "skewed")
    return f"{what}, {step} steps"


def cells(runs: pd.DataFrame, task: tuple[str, str, int]) -> pd.DataFrame:
    """A row for every method of a task.

    Columns besides the method's: share, of DDP's bytes; delay, local steps that its means are late (0
    where workers wait for them); behind, how much worse than DDP on the test set, in points of accuracy or
    in nats; held, the same on the validation set; spread, the standard deviation over seeds; seeds.
    """
    model, partition, step = task
    mine = runs[(runs.model == model) & (runs.partition == partition) & (runs.step == step)]
    synchronous = mine[mine.algorithm == SYNCHRONOUS]
    score, sign, scale = ("loss", 1, 1.0) if model in TEXT_MODELS else ("accuracy", -1, 100.0)
    made = mine.assign(
        share=mine.bytes / synchronous.bytes.mean(),
        delay=mine.staleness.fillna(0.0).round().astype(int),
        **{
            column: sign * scale * (mine[f"{on}_{score}"] - synchronous[f"{on}_{score}"].mean())
            for column, on in (("behind", "test"), ("held", "validation"))
        },
    )
    found = (
        made.groupby(_METHOD, sort=False)
        .agg(
            share=("share", "mean"),
            delay=("delay", "first"),
            behind=("behind", "mean"),
            held=("held", "mean"),
            spread=("behind", "std"),
            seeds=("seed", "nunique"),
            diverged=("diverged", "any"),
        )
        .reset_index()
    )
    # A grid whose learning rates were changed may have final runs at two of them.
    return found.loc[found.groupby("label", sort=False).held.idxmin()].reset_index(drop=True)


def best(found: pd.DataFrame, share: float, latency: int) -> pd.Series[Any] | None:
    """Of the methods that send no more and whose means are late enough for a message of this latency, the
    one that was best on the validation set; None where there is none."""
    fits = found[(found.share <= share) & (found.delay >= latency) & ~found.diverged]
    return None if fits.empty else fits.loc[fits.held.idxmin()]


def front(runs: pd.DataFrame) -> list[list[str]]:
    """Rows for a table: a latency and a budget, and what is best there, for each task; none where there is
    nothing yet."""
    made = {task: cells(runs, task) for task in tasks(runs)}
    lines = [["a message takes", "bytes, at most", *(name(task) for task in made)]]
    for latency in LATENCIES:
        for budget, share in BUDGETS.items():
            found = [best(cell, share, latency) for cell in made.values()]
            if any(cell is not None for cell in found):
                steps = f"{latency} step{'s' if latency > 1 else ''}"
                lines.append([steps, budget, *map(said, found)])
    return lines


def everything(runs: pd.DataFrame) -> list[list[str]]:
    """Rows for a table: every method, and how far behind DDP it is in each task, at which share of its
    bytes."""
    made = {task: cells(runs, task).set_index("label") for task in tasks(runs)}
    lines = [
        [label, *(_at(found.loc[label]) if label in found.index else "" for found in made.values())]
        for label in dict.fromkeys(runs.label)
    ]
    return [["method", *(name(task) for task in made)], *lines]


def tried(trials: pd.DataFrame, model: str, partition: str) -> list[list[str]]:
    """Rows for a table: every method, and its score on the validation set at each learning rate, in runs of
    half the length."""
    mine = trials[(trials.model == model) & (trials.partition == partition)]
    score = "validation_loss" if model in TEXT_MODELS else "validation_accuracy"
    scale, digits = (1, 3) if model in TEXT_MODELS else (100, 2)
    rates = sorted(mine.lr.unique())
    lines = [["method", *(f"{lr:g}" for lr in rates)]]
    for label, rows in mine.groupby("label", sort=False):
        found = dict(zip(rows.lr, scale * rows[score], strict=True))
        lines.append(
            [str(label), *(f"{found[lr]:.{digits}f}" if lr in found else "" for lr in rates)]
        )
    return lines


def said(cell: pd.Series[Any] | None) -> str:
    """How far behind DDP, and by what."""
    return "" if cell is None else f"{_behind(cell)} ({cell.label})"


def _behind(cell: pd.Series[Any]) -> str:
    if cell.diverged:
        return "diverged"
    return f"{round(cell.behind, 2) + 0.0:+.2f}" + (
        f" +- {cell.spread:.2f}" if cell.seeds > 1 else ""
    )


def _at(cell: pd.Series[Any]) -> str:
    return _behind(cell) + ("" if cell.share == 1 else f", 1/{1 / cell.share:.3g}")


def by_bytes(runs: pd.DataFrame) -> bytes:
    """How far behind DDP against the share of its bytes, a panel per task; marks say how late means are,
    lines join the best of each latency."""
    shown = tasks(runs)
    styles = {label: i for i, label in enumerate(dict.fromkeys(runs.algorithm))}

    def fill(axes: Any) -> None:
        for axis, task in zip(axes[0], shown, strict=True):
            found = cells(runs, task)
            axis.set_title(name(task))
            axis.set_xscale("log")
            axis.invert_xaxis()
            axis.set_xticks([1, *BUDGETS.values()], ["1", *BUDGETS], minor=False)
            axis.minorticks_off()
            axis.set_xlabel("share of DDP's bytes")
            axis.axhline(0, color=drawing.GREY, linewidth=0.8)
            for cell in found[~found.diverged].itertuples():
                axis.plot(
                    cell.share,
                    cell.behind,
                    color=drawing.colour(styles[cell.algorithm]),
                    marker=_MARKS.get(cell.delay, "o"),
                    markersize=7,
                )
            for latency, line in zip(LATENCIES, ("-", "--", ":"), strict=True):
                _stair(axis, found, latency, line)
            unit = "nats" if task[0] in TEXT_MODELS else "points"
            axis.set_ylabel(f"behind DDP, {unit}")
        _legend(axes, styles)

    return drawing.png(fill, 1, len(shown), height=4.2)


def by_latency(runs: pd.DataFrame) -> bytes:
    """The same against the steps that a message takes: the best of each budget of bytes."""
    shown = tasks(runs)

    def fill(axes: Any) -> None:
        for axis, task in zip(axes[0], shown, strict=True):
            found = cells(runs, task)
            axis.set_title(name(task))
            axis.set_xlabel("local steps that a message takes")
            axis.set_xscale("log", base=2)
            axis.set_xticks(LATENCIES, [str(steps) for steps in LATENCIES])
            axis.axhline(0, color=drawing.GREY, linewidth=0.8)
            for i, share in enumerate(BUDGETS.values()):
                chosen = [(steps, best(found, share, steps)) for steps in LATENCIES]
                there = [(steps, cell.behind) for steps, cell in chosen if cell is not None]
                axis.plot(*zip(*there, strict=True) if there else ((), ()), **drawing.look(i))
            unit = "nats" if task[0] in TEXT_MODELS else "points"
            axis.set_ylabel(f"behind DDP, {unit}")
        drawing.names(axes, {f"{budget} of DDP's bytes": i for i, budget in enumerate(BUDGETS)})

    return drawing.png(fill, 1, len(shown), height=4.0)


def _stair(axis: Any, found: pd.DataFrame, latency: int, line: str) -> None:
    """The best so far of what hides this latency, from many bytes to few."""
    fits = found[(found.delay >= latency) & ~found.diverged].sort_values("share", ascending=False)
    least = [fits.behind[fits.share <= share].min() for share in fits.share]
    axis.step(fits.share, least, where="post", color=drawing.GREY, linestyle=line, linewidth=1)


def _legend(axes: Any, styles: dict[str, int]) -> None:
    from matplotlib.lines import Line2D

    methods = [
        Line2D([], [], color=drawing.colour(i), marker="o", linestyle="none", label=label)
        for label, i in styles.items()
    ]
    marks = [
        Line2D([], [], color=drawing.GREY, marker=mark, linestyle="none", label=_late(steps))
        for steps, mark in _MARKS.items()
    ]
    drawing.legend(axes, [*methods, *marks])


def _late(steps: int) -> str:
    return f"{steps} step{'s' if steps > 1 else ''} late" if steps else "waited for"


def final(folder: Path) -> pd.DataFrame:
    """The final runs of the study."""
    ended = frames.read(folder).ended
    return ended[ended.stage == frames.FINAL]


def main(folder: Path = RESULTS) -> Sequence[Path]:
    """Draw both pictures; returns their paths."""
    runs = final(folder)
    drawn = {"bytes.png": by_bytes(runs), "latency.png": by_latency(runs)}
    for file, picture in drawn.items():
        (folder / file).write_bytes(picture)
    return [folder / file for file in drawn]


if __name__ == "__main__":
    main()
