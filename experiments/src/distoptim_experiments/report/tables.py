"""The tables of a report: accuracies or losses, and the learning rates that were tried."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

import pandas as pd

from distoptim_experiments.report import runs as reported

NONE = "–"  # noqa: RUF001  # a dash as wide as a figure


@dataclass(frozen=True)
class Table:
    """Texts under a header, and which of them are the best of their kind.

    Attributes:
        title: above it.
        texts: the first column names the row.
        best: of the same rows; columns that can have no best are not there.
    """

    title: str
    texts: pd.DataFrame
    best: pd.DataFrame


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds.

    Attributes:
        values: one per seed that did not diverge: shares of 1, the more the better, or losses.
        diverged: how many did.
        loss: in nats, the less the better.
    """

    values: pd.Series[float]
    diverged: int = 0
    loss: bool = False

    @property
    def seeds(self) -> int:
        """How many there are."""
        return len(self.values) + self.diverged

    def text(self, *, counted: bool) -> str:
        """In per cent, or nats.

        Diverged ones are always counted, others if their number is to be told.
        """
        values = list(self.values)
        scale, digits = self._print
        parts = [f"{scale * fmean(values):.{digits}f}"] if values else []
        if len(values) > 1:
            parts.append(f"± {scale * stdev(values):.{digits}f}")
        if self.diverged and values:
            parts.append(f"({self.diverged} of {self.seeds} diverged)")
        elif self.diverged:
            parts.append(f"diverged ({self.seeds})")
        elif values and counted:
            parts.append(f"({self.seeds})")
        return " ".join(parts) or NONE

    @property
    def rank(self) -> float:
        """The mean as it is printed, of losses times -1.

        With a diverged run among them no candidate for the best.
        """
        if not len(self.values) or self.diverged:
            return -math.inf
        scale, digits = self._print
        return round((-scale if self.loss else scale) * fmean(self.values), digits)

    @property
    def _print(self) -> tuple[int, int]:
        """Factor and decimals."""
        return (1, 3) if self.loss else (100, 2)


def spread(runs: pd.DataFrame, name: str) -> Spread:
    """A figure over seeds."""
    values = runs[name][~runs.diverged].dropna()
    return Spread(values, int(runs.diverged.sum()), name.endswith("_loss"))


def scores(runs: pd.DataFrame, score: str) -> list[Table]:
    """One table per partition: methods x tau, the best of each column in bold.

    Args:
        runs: those of the comparison.
        score: a share of 1, or a loss.
    """
    tables = []
    for partition in reported.partitions(runs):
        rows = runs[runs.partition == partition].groupby("name", sort=False)
        spreads = pd.DataFrame(
            {
                f"tau {tau}": {name: spread(reported.at(row, tau), score) for name, row in rows}
                for tau in reported.taus(runs)
            }
        )
        texts, best = _cells(spreads, axis="index", counted=seeds(runs) is None)
        texts.insert(0, "method", texts.index)
        tables.append(Table(partition, texts, best))
    return tables


def learning_rates(tuning: pd.DataFrame, final: pd.DataFrame, score: str) -> list[Table]:
    """One table per partition: methods and tau x learning rate -> score on the validation set, best
    in bold.

    Args:
        tuning: the runs that chose.
        final: those that were made with what was chosen; the last column is theirs.
        score: a share of 1, or a loss.
    """
    tables = []
    for partition in reported.partitions(tuning):
        group = tuning[tuning.partition == partition]
        rows = list(group.groupby(["label", "tau"], sort=False))
        spreads = pd.DataFrame(
            [
                {f"lr {lr:g}": spread(row[row.lr == lr], score) for lr in sorted(group.lr.unique())}
                for _, row in rows
            ]
        )
        texts, best = _cells(spreads, axis="columns", counted=seeds(tuning) is None)
        texts.insert(0, "method", [row.label.iloc[0] for _, row in rows])
        texts.insert(
            1, "tau", [NONE if row.synchronous.all() else str(tau) for (_, tau), row in rows]
        )
        used = final[final.partition == partition]
        texts["used"] = [
            _rates(used[(used.label == label) & (used.tau == tau)]) for (label, tau), _ in rows
        ]
        tables.append(Table(partition, texts, best))
    return tables


def seeds(runs: pd.DataFrame) -> int | None:
    """How many seeds every setting was run with; None if that differs."""
    counts = runs.groupby(["name", "tau", "partition", "stage", "lr"]).size().unique()
    return int(counts[0]) if len(counts) == 1 else None


def _cells(
    spreads: pd.DataFrame, *, axis: Literal["index", "columns"], counted: bool
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Texts, and whether they are the best along an axis."""
    ranks = spreads.map(lambda found: found.rank).astype(float)
    best = ranks.eq(ranks.max(axis=axis), axis="columns" if axis == "index" else "index")
    return spreads.map(lambda found: found.text(counted=counted)), best & (ranks > -math.inf)


def _rates(runs: pd.DataFrame) -> str:
    return ", ".join(f"{lr:g}" for lr in sorted(runs.lr.unique())) or NONE
