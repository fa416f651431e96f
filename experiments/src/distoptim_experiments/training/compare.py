"""The same training with one method after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distoptim_experiments import optimizers, records
from distoptim_experiments.config import RunConfig, compared
from distoptim_experiments.training.launch import Job, run_local
from distoptim_experiments.training.loop import Observer

PAPER = ("ddp", "local-sgd", "easgd", "cocod-sgd", "bmuf", "overlap-local-sgd")
"""The methods of the Overlap-Local-SGD paper."""
COMPARED = (*PAPER, "global-momentum")


def variants(
    config: RunConfig, methods: Sequence[str], options: Mapping[str, Any] | None = None
) -> list[RunConfig]:
    """`config` once per method, all checked; options go to the methods that take them.

    Raises:
        ValueError: there is no such method, one is named twice, or a value does not suit it; an
            option of none of them.
    """
    if len(set(methods)) < len(methods) or not methods:
        raise ValueError(f"methods={', '.join(methods)!r}: allowed is a list of different methods")
    common = {**config.to_dict(), "checkpoint_every": 0}
    return [
        optimizers.check(compared({**common, "algorithm": name, "options": own}))
        for name, own in optimizers.shared_options(options or {}, methods).items()
    ]


def compare(
    configs: Sequence[RunConfig], folder: Path, observer: Callable[[RunConfig], Observer]
) -> int:
    """Run all, each in its own folder below `folder`; returns the signal that stopped one, or 0.

    Args:
        configs: one per method.
        folder: of the comparison.
        observer: makes what watches a run's lines.

    Raises:
        WorkerError: a worker failed.
    """
    for config in configs:
        signum = run_local(Job(config, folder / config.algorithm), [observer(config)])
        if signum:
            return signum
    return 0


def read(folder: Path) -> list[records.Record]:
    """The records of a comparison, those that have ended, in the order in which they were made.

    Raises:
        ValueError: a damaged record, or none at all.
    """
    found = [records.read(path) for path in folder.glob(f"*/{records.FILE}")]
    ended = sorted(
        (r for r in found if r.summary is not None), key=lambda r: r.start.surroundings.date
    )
    if not ended:
        raise ValueError(f"{folder}: no finished run there")
    return ended
