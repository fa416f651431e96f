"""Who gets which samples: dealt out evenly, skewed by label, or at random per class."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from distoptim import checks

Partition = Callable[[Tensor, int, torch.Generator], list[Tensor]]


def iid(labels: Tensor, workers: int, generator: torch.Generator) -> list[Tensor]:
    """Shuffle, then deal out like cards: shards differ by one sample at most."""
    order = torch.randperm(len(labels), generator=generator)
    return [order[rank::workers] for rank in range(workers)]


def label_skew(
    labels: Tensor, workers: int, generator: torch.Generator, *, share: float = 0.64
) -> list[Tensor]:
    """Every worker has a main class that makes up `share` of its samples; the rest is dealt out
    from what is left.

    Shards differ by one sample at most. Of 50,000 samples of 10 classes 16 workers get 3125 each,
    2000 of them of one class, as in the experiments of Overlap-Local-SGD. A class with too few
    samples for all its workers is divided among them.

    Args:
        labels: [n].
        workers: how many.
        generator: of the shuffle.
        share: in (0, 1]; the default is the paper's 2000 of 3125.
    """
    order = torch.randperm(len(labels), generator=generator)
    owners = main_classes(workers, int(labels.max()) + 1)
    sizes = [len(range(rank, len(labels), workers)) for rank in range(workers)]
    mine: list[Tensor] = []
    taken = dict.fromkeys(owners, 0)
    for rank, label in enumerate(owners):
        members = order[labels[order] == label]
        want = min(round(share * sizes[rank]), len(members) // owners.count(label))
        mine.append(members[taken[label] : taken[label] + want])
        taken[label] += want
    left = torch.ones(len(labels), dtype=torch.bool)
    left[torch.cat(mine)] = False
    # Shuffled anew: what is left of a class that has owners lies at the end of the first order.
    others = order[left[order]]
    others = others[torch.randperm(len(others), generator=generator)]
    rest = torch.split(others, [size - len(main) for size, main in zip(sizes, mine, strict=True)])
    return [torch.cat(pair) for pair in zip(mine, rest, strict=True)]


def main_classes(workers: int, classes: int) -> list[int]:
    """The main class of each worker: all in turn, then the odd ones before the even ones, from 1,
    again and again.

    For 16 workers and 10 classes: 0 to 9, then 1, 3, 5, 7, 9, 2, as in the paper's code.
    """
    again = [*range(1, classes, 2), *range(2, classes, 2), 0]
    return [
        rank if rank < classes else again[(rank - classes) % classes] for rank in range(workers)
    ]


def dirichlet(
    labels: Tensor, workers: int, generator: torch.Generator, *, concentration: float = 0.5
) -> list[Tensor]:
    """Each class is divided among the workers in proportions from Dirichlet(concentration); shards
    differ in size.

    Args:
        labels: [n].
        workers: how many.
        generator: of proportions and shuffle.
        concentration: > 0; small gives each worker few classes, large approaches `iid`.
    """
    order = torch.randperm(len(labels), generator=generator)
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    shards: list[list[Tensor]] = [[] for _ in range(workers)]
    for label in range(int(labels.max()) + 1):
        members = order[labels[order] == label]
        cuts = (
            (rng.dirichlet([concentration] * workers).cumsum()[:-1] * len(members))
            .round()
            .astype(int)
        )
        for shard, part in zip(shards, torch.tensor_split(members, cuts.tolist()), strict=True):
            shard.append(part)
    return [torch.cat(shard) for shard in shards]


def parse(name: str) -> Partition:
    """A partition by name: "iid", "label-skew" or "label-skew:SHARE", "dirichlet" or
    "dirichlet:CONCENTRATION".

    Raises:
        ValueError: there is no such partition, or its number is outside its range.
    """
    kind, colon, text = name.partition(":")
    if name == "iid":
        return iid
    try:
        value = float(text) if colon else None
    except ValueError:
        value = float("nan")
    if kind == "label-skew":
        return (
            label_skew
            if value is None
            else partial(
                label_skew,
                share=checks.number(f"partition={name!r}: the share", value, 0, 1, open_low=True),
            )
        )
    if kind == "dirichlet":
        return (
            dirichlet
            if value is None
            else partial(
                dirichlet,
                concentration=checks.number(
                    f"partition={name!r}: the concentration", value, 0, 1e6, open_low=True
                ),
            )
        )
    raise ValueError(
        f"partition={name!r}: allowed is one of iid, label-skew, label-skew:SHARE, dirichlet, "
        "dirichlet:CONCENTRATION"
    )


def partition(name: str, labels: Tensor, *, workers: int, seed: int) -> list[Tensor]:
    """The indices of each worker's samples; together every sample exactly once.

    Args:
        name: see `parse`.
        labels: of the training set, [n].
        workers: how many, >= 1.
        seed: of the shuffle; the same on all workers.

    Raises:
        ValueError: there is no such partition, or a worker would get nothing.
    """
    cut = parse(name)
    # Not tried where it cannot be: it would take minutes.
    enough = workers <= len(labels)
    shards = cut(labels, workers, torch.Generator().manual_seed(seed)) if enough else []
    if not enough or not all(len(shard) for shard in shards):
        raise ValueError(
            f"workers={workers}: partition {name!r} of {len(labels)} samples leaves one without any"
        )
    return shards
