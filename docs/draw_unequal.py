"""Draw unequal.png and print its numbers: machines of unequal speed, with equal tau and with equal time.

Run: python docs/draw_unequal.py
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from distoptim_experiments.config import RunConfig
from distoptim_experiments.machines import Machines
from distoptim_experiments.report.figure import COLOURS, save
from distoptim_experiments.training.problem import Problem
from distoptim_experiments.training.virtual import Virtual

from distoptim import OverlapLocalSGD
from distoptim.periods import EqualTime
from distoptim.simulator import Cluster

SPEEDS = (1.0, 2.0, 3.0, 4.0)
STEP_S = 0.1
ROUND_S = 0.8
TAU = 20
"""As many local steps as a round of equal time has on the mean of these workers."""

SEEDS = range(5)
UNTIL_S = 24.0
TARGET = 0.95

RUN = RunConfig(
    algorithm="overlap-local-sgd",
    tau=TAU,
    workers=16,
    data="digits",
    model="mlp",
    batch_size=8,
    lr=0.02,
    steps=10**6,
)
EQUAL_TIME = {"equal_time": ROUND_S}
VARIANTS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "tau = 20": ({}, SPEEDS),
    "tau = 20 without the four slowest": ({"workers": 12}, SPEEDS[1:]),
    "EqualTime(0.8)": (EQUAL_TIME, SPEEDS),
    'EqualTime(0.8, weigh="workers")': ({**EQUAL_TIME, "weigh": "workers"}, SPEEDS),
    "tau = 20, equal machines of the same sum": ({}, (2.5,)),
}
PARTITIONS = {"the same data": "iid", "other classes on each worker": "dirichlet:0.3"}


class Slowing:
    """Speeds 1 to 4; the last worker becomes ten times slower after three seconds."""

    def seconds(self, rank: int, step: int) -> float:
        """Of a local step."""
        alone = STEP_S / SPEEDS[rank]
        return alone * (10 if rank == 3 and step >= 3 / alone else 1)


def curve(changes: dict[str, Any], speeds: tuple[float, ...]) -> list[tuple[float, int, float]]:
    """(seconds, samples of all workers, accuracy of their mean), round by round."""
    config = RUN.replace(**changes)
    machines = Machines(step_ms=1e3 * STEP_S, speeds=speeds)
    workers = Virtual(Problem(config), machines, threads=1)
    out = []
    rounds = 0
    while workers.seconds() < UNTIL_S:
        while workers.cluster.optimizers[0].rounds <= rounds:
            workers.step(rounds)
        rounds = workers.cluster.optimizers[0].rounds
        steps = sum(optimizer.engine.step for optimizer in workers.cluster.optimizers)
        found = workers.evaluate()["test_accuracy"]
        out.append((workers.seconds(), steps * config.batch_size, found))
    return out


def reached(curves: list[list[tuple[float, int, float]]]) -> str:
    """Seconds to the target, median and range of the seeds."""
    found = sorted(
        next((s for s, _, accuracy in one if accuracy >= TARGET), float("inf")) for one in curves
    )
    return f"{statistics.median(found):.1f} ({found[0]:.1f} to {found[-1]:.1f})"


def at_samples(curves: list[list[tuple[float, int, float]]], samples: int) -> str:
    """Accuracy in per cent when so many samples were seen, mean and standard deviation."""
    found = [
        100 * next(a for _, n, a in one if n >= samples) for one in curves if one[-1][1] >= samples
    ]
    if len(found) < len(curves):
        return "-"
    return f"{statistics.mean(found):.2f} ± {statistics.stdev(found):.2f}"


def lines(tau: Any) -> tuple[list[list[tuple[float, float]]], list[list[float]]]:
    """Of each of four workers: when it computed, and when its rounds ended."""
    cluster = Cluster(
        workers=4,
        model=partial(torch.nn.Linear, 1, 1),
        optimizer=partial(OverlapLocalSGD, tau=tau, lr=0.0),
        compute=Slowing(),
        threads=1,
    )
    busy: list[list[tuple[float, float]]] = [[] for _ in SPEEDS]
    ends: list[list[float]] = [[] for _ in SPEEDS]
    # Nothing is trained here, so that all send the same.
    warnings.simplefilter("ignore", RuntimeWarning)
    while cluster.seconds() < 9:
        before = [optimizer.engine.step for optimizer in cluster.optimizers]
        started = list(cluster.fabric.clocks)
        rounds = cluster.optimizers[0].rounds
        cluster.advance(1)
        for rank, optimizer in enumerate(cluster.optimizers):
            if optimizer.engine.step > before[rank]:
                seconds = Slowing().seconds(rank, before[rank])
                busy[rank].append((started[rank], seconds))
            if optimizer.rounds > rounds:
                ends[rank].append(sum(busy[rank][-1]))
    return busy, ends


def draw(curves: dict[str, list[list[tuple[float, int, float]]]], path: Path) -> None:
    """Workers' rounds on a time line, and accuracy against time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.8, 4.6), layout="constrained")
    grid = figure.add_gridspec(2, 2)
    for row, (title, tau) in enumerate(
        (("the same tau on all", TAU), ("EqualTime(0.8)", EqualTime(ROUND_S)))
    ):
        axes: Any = figure.add_subplot(grid[row, 0])
        for rank, (busy, ends) in enumerate(zip(*lines(tau), strict=True)):
            axes.broken_barh(busy, (rank - 0.35, 0.7), color=COLOURS[2])
            axes.vlines(ends, rank - 0.45, rank + 0.45, color="black", linewidth=1.2)
        axes.set_yticks(range(4), [f"speed {s:g}" for s in SPEEDS])
        axes.set_xlim(0, 8)
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(
        "seconds; blue: computes, white: waits, bar: its round ends; speed 4 is 0.4 after 120 steps"
    )
    right: Any = figure.add_subplot(grid[:, 1])
    for i, (name, seeds) in enumerate(curves.items()):
        for k, one in enumerate(seeds):
            right.plot(
                [s for s, _, _ in one],
                [100 * a for _, _, a in one],
                color=COLOURS[i],
                linewidth=1.3,
                alpha=0.6,
                label=None if k else name,
            )
    right.set_ylim(70, 99)
    right.set_xlim(0, UNTIL_S)
    right.set_xlabel("virtual seconds")
    right.set_title(
        "accuracy of the workers' mean, %; 16 workers, speeds 1 to 4",
        loc="left",
        fontsize=10,
        fontweight="bold",
    )
    right.legend(frameon=False, fontsize=9, loc="lower right")
    right.spines[["top", "right"]].set_visible(False)
    save(figure, path, dpi=130)


def rows(curves: dict[str, list[list[tuple[float, int, float]]]]) -> Iterator[str]:
    """A Markdown table."""
    # What the slowest of them has seen at the end.
    samples = min(one[-1][1] for seeds in curves.values() for one in seeds)
    yield f"| | rounds | seconds to {TARGET:.0%} | % at {samples:,} samples | % at the end |"
    yield "|---|---|---|---|---|"
    for name, seeds in curves.items():
        end = [100 * one[-1][2] for one in seeds]
        yield (
            f"| {name} | {len(seeds[0])} | {reached(seeds)} | {at_samples(seeds, samples)} | "
            f"{statistics.mean(end):.2f} ± {statistics.stdev(end):.2f} |"
        )


def main() -> None:
    """Simulate, print, draw."""
    torch.set_num_threads(1)
    for title, partition in PARTITIONS.items():
        curves = {
            name: [
                curve({**changes, "partition": partition, "seed": seed}, speeds) for seed in SEEDS
            ]
            for name, (changes, speeds) in VARIANTS.items()
        }
        print(f"\n{title} ({partition})\n", *rows(curves), sep="\n", flush=True)
        if partition == "iid":
            draw(curves, Path(__file__).with_name("unequal.png"))


if __name__ == "__main__":
    main()
