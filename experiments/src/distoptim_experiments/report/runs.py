"""Runs as a report shows them: newest of their kind, in order, told apart by names and styles."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pandas as pd

from distoptim_experiments import frames
from distoptim_experiments.config import POWERSGD, SYNCHRONOUS
from distoptim_experiments.frames import Runs
from distoptim_experiments.report.figure import COLOURS
from distoptim_experiments.training.compare import PAPER

PLACE = ["experiment", "label", "tau", "partition", "slowdown"]
"""Final runs that have these in common should differ in nothing but the seed."""


def named(found: Runs) -> Runs:
    """Runs in the order of a report, with columns that it needs.

    They are: `experiment`, what only runs that have it in common can be compared; `synchronous`,
    there is no tau; `name`, the label with what tells it from others of that label; `style`, the
    number of the method's colour and marker, the same in all reports for the methods of the paper.
    Of runs of one configuration and seed the newest is kept.
    """
    runs = found.ended
    kind = runs.virtual.map({True: "virtual", False: "real"})
    runs = runs.assign(
        experiment=runs.model + " on " + runs.data + ", " + kind + " workers",
        synchronous=runs.algorithm.isin([SYNCHRONOUS, POWERSGD]),
        slowdown=runs.slowdown.mask(runs.trace.notna(), "trace")
        if "trace" in runs
        else runs.slowdown,
    )
    kept = _newest(runs)
    notes = list(found.notes)
    if len(kept) < len(runs):
        notes.append(
            f"{len(runs) - len(kept)} superseded by a later run of the same configuration, left out"
        )
    kept = _told_apart(kept)
    order = {name: i for i, name in enumerate(PAPER)}
    kept = kept.assign(order=kept.algorithm.map(order).fillna(len(order)))
    kept = kept.sort_values(["order", "name", "tau", "partition", "seed"], kind="stable")
    parts = [_styled(part) for _, part in kept.groupby("experiment", sort=False)]
    return Runs(pd.concat(parts, ignore_index=True), found.curves, notes)


def partitions(runs: pd.DataFrame) -> list[str]:
    """Their partitions, "iid" first."""
    return sorted(runs.partition.unique(), key=lambda name: (name != "iid", name))


def taus(runs: pd.DataFrame) -> list[int]:
    """Their periods; synchronous SGD, which has none, counts only alone."""
    with_rounds = runs[~runs.synchronous]
    return sorted((with_rounds if len(with_rounds) else runs).tau.unique().tolist())


def at(runs: pd.DataFrame, tau: int) -> pd.DataFrame:
    """Those to be shown at a period: synchronous SGD at every one."""
    return runs[(runs.tau == tau) | runs.synchronous]


def styles(runs: pd.DataFrame) -> dict[str, int]:
    """The names of methods, in order, with the numbers of their styles."""
    first = runs.drop_duplicates("name")
    return dict(zip(first.name, first["style"], strict=True))


def options(runs: pd.DataFrame) -> pd.DataFrame:
    """What their algorithms were given, a column each."""
    return pd.DataFrame([json.loads(text) for text in runs.options], index=runs.index)


def settings(runs: pd.DataFrame) -> pd.DataFrame:
    """All that their results depend on but the seed."""
    columns = [name for name in frames.SETTINGS if name in runs]
    own = options(runs)
    return pd.concat([runs[columns].drop(columns=own.columns, errors="ignore"), own], axis=1)


def text(value: Any) -> str:
    """A setting, in a name or a sentence."""
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def _newest(runs: pd.DataFrame) -> pd.DataFrame:
    """One run per configuration and seed."""
    alike = [
        name for name in (*frames.SETTINGS, "seed", "label", "stage", "options") if name in runs
    ]
    return runs.sort_values("date", kind="stable").drop_duplicates(alike, keep="last")


def _told_apart(runs: pd.DataFrame) -> pd.DataFrame:
    """Final runs that differ in more than seed, tau and partition get a name that says in what."""
    names = runs.label.copy()
    for _, group in runs[runs.stage == frames.FINAL].groupby(PLACE):
        made = settings(group)
        for name in made.columns[made.nunique(dropna=False) > 1]:
            said = made[name].map(lambda x: "default" if pd.isna(x) else text(x))
            names[group.index] += f", {name} " + said
    return runs.assign(name=names)


def _styled(runs: pd.DataFrame) -> pd.DataFrame:
    """The methods of the paper have numbers of their own.

    Others, and variants, get what is left, black at last.
    """
    final = runs[runs.stage == frames.FINAL].drop_duplicates("name")
    own = final[final.algorithm.isin(PAPER)].drop_duplicates("algorithm")
    numbers = {
        name: PAPER.index(algorithm)
        for name, algorithm in zip(own.name, own.algorithm, strict=True)
    }
    left = _numbers_but(set(numbers.values()))
    for name in final.name:
        if name not in numbers:
            numbers[name] = next(left)
    return runs.assign(style=runs.name.map(numbers).fillna(0).astype(int))


def _numbers_but(taken: set[int]) -> Iterator[int]:
    numbers = itertools.chain(
        range(len(PAPER), len(COLOURS)),
        reversed(range(len(PAPER))),
        itertools.count(len(COLOURS)),
    )
    return (i for i in numbers if i not in taken)
