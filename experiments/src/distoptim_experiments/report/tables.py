"""The tables of a report: accuracies or losses, and the learning rates that were tried."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from distoptim_experiments.report import runs as grid
from distoptim_experiments.report.runs import Run

NONE = "–"  # noqa: RUF001  # a dash as wide as a figure


@dataclass(frozen=True)
class Cell:
    """Text in a table; the best of its kind in bold."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under a header; the first column names the row."""

    title: str
    header: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds.

    Attributes:
        values: one per seed that did not diverge: shares of 1, the more the better, or losses.
        diverged: how many did.
        loss: in nats, the less the better.
    """

    values: list[float]
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
        scale, digits = self._print
        parts = []
        if self.values:
            parts.append(f"{scale * statistics.fmean(self.values):.{digits}f}")
        if len(self.values) > 1:
            parts.append(f"± {scale * statistics.stdev(self.values):.{digits}f}")
        if self.diverged:
            parts.append(
                f"({self.diverged} of {self.seeds} diverged)"
                if self.values
                else f"diverged ({self.seeds})"
            )
        elif self.values and counted:
            parts.append(f"({self.seeds})")
        return " ".join(parts) or NONE

    @property
    def rank(self) -> float:
        """The mean as it is printed, of losses times -1.

        With a diverged run among them no candidate for the best.
        """
        scale, digits = self._print
        if not self.values or self.diverged:
            return -math.inf
        return round((-scale if self.loss else scale) * statistics.fmean(self.values), digits)

    @property
    def _print(self) -> tuple[int, int]:
        """Factor and decimals."""
        return (1, 3) if self.loss else (100, 2)


def spread(runs: Sequence[Run], name: str) -> Spread:
    """A figure of the summaries over seeds."""
    values = [run.value(name) for run in runs if not run.diverged]
    return Spread(
        [v for v in values if v is not None],
        sum(run.diverged for run in runs),
        name.endswith("_loss"),
    )


def scores(runs: Sequence[Run], name: str) -> list[Table]:
    """One table per partition: methods x tau, the best of each column in bold.

    Args:
        runs: those of the comparison.
        name: of the figure in the records, a share of 1 or a loss.
    """
    tables, counted, columns = [], seeds(runs) is None, grid.taus(runs)
    for partition in grid.partitions(runs):
        rows = grid.by((run for run in runs if run.partition == partition), lambda run: run.label)
        spreads = [[spread(grid.at(row, tau), name) for tau in columns] for row in rows.values()]
        best = [
            max(column) for column in zip(*([s.rank for s in row] for row in spreads), strict=True)
        ]
        tables.append(
            Table(
                partition,
                ["method", *(f"tau {tau}" for tau in columns)],
                [
                    [Cell(label), *(_cell(s, b, counted) for s, b in zip(row, best, strict=True))]
                    for label, row in zip(rows, spreads, strict=True)
                ],
            )
        )
    return tables


def seeds(runs: Sequence[Run]) -> int | None:
    """How many seeds every setting was run with; None if that differs."""
    groups = grid.by(
        runs, lambda run: (run.label, run.tau, run.partition, run.tuning, run.record.config.lr)
    )
    counts = {len(group) for group in groups.values()}
    return counts.pop() if len(counts) == 1 else None


def _cell(found: Spread, best: float, counted: bool) -> Cell:
    return Cell(found.text(counted=counted), found.rank == best > -math.inf)


def learning_rates(tuning: Sequence[Run], final: Sequence[Run], name: str) -> list[Table]:
    """One table per partition: methods and tau x learning rate -> score on the validation set, best
    in bold.

    Args:
        tuning: the runs that chose.
        final: those that were made with what was chosen; the last column is theirs.
        name: of the score in the records.
    """
    tables, counted = [], seeds(tuning) is None
    for partition in grid.partitions(tuning):
        group = [run for run in tuning if run.partition == partition]
        tried = sorted({run.record.config.lr for run in group})
        rows = []
        for (label, tau, synchronous), row in grid.by(
            group, lambda r: (r.label, r.tau, r.synchronous)
        ).items():
            spreads = [spread([r for r in row if r.record.config.lr == lr], name) for lr in tried]
            best = max(s.rank for s in spreads)
            used = sorted(
                {
                    r.record.config.lr
                    for r in final
                    if (r.partition, r.tau, r.method) == (partition, tau, label)
                }
            )
            rows.append(
                [
                    Cell(label),
                    Cell(NONE if synchronous else str(tau)),
                    *(_cell(s, best, counted) for s in spreads),
                    Cell(", ".join(f"{lr:g}" for lr in used) or NONE),
                ]
            )
        tables.append(
            Table(partition, ["method", "tau", *(f"lr {lr:g}" for lr in tried), "used"], rows)
        )
    return tables
