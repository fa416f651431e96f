"""Which labels each worker has: a table and a picture of a partition."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from distoptim_experiments.report.figure import save


def counts(labels: Tensor, shards: Sequence[Tensor], classes: int) -> list[list[int]]:
    """For each worker, how many samples of each class it has.

    Args:
        labels: of the training set, [n].
        shards: for each worker, the indices of its samples.
        classes: how many there are.
    """
    return [torch.bincount(labels[shard], minlength=classes).tolist() for shard in shards]


def draw(table: Sequence[Sequence[int]], path: Path, *, title: str) -> None:
    """Write the picture: one row a worker, one column a class, the darker the more samples,
    with the number.

    Args:
        table: see `counts`; the numbers are left out where there are more than 20 classes.
        path: see `figure.save`.
        title: above it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    workers = len(table)
    classes = len(table[0])
    most = max(max(row) for row in table)
    figure, axes = plt.subplots(
        figsize=(min(14, 2 + 0.55 * classes), 1.2 + 0.3 * workers), layout="constrained"
    )
    axes.imshow(table, cmap="Blues", vmin=0, aspect="auto")
    if classes <= 20:
        axes.set_xticks(range(classes))
        for y, row in enumerate(table):
            for x, value in enumerate(row):
                axes.text(
                    x,
                    y,
                    str(value),
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="white" if value > 0.6 * most else "black",
                )
    axes.set_yticks(range(workers))
    axes.tick_params(length=0)
    axes.set_xlabel("class")
    axes.set_ylabel("worker")
    axes.set_title(title, fontsize=11, loc="left")
    save(figure, path, dpi=120)
    plt.close(figure)
