"""How long runs will take here: one training step of each kind is timed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from distoptim_experiments.config import DTYPES, RunConfig
from distoptim_experiments.data import datasets as data
from distoptim_experiments.models import registry as models
from distoptim_experiments.training.methods.base import batch_loss


def seconds(configs: Sequence[RunConfig], *, virtual: bool) -> float:
    """Of all runs one after the other: their steps, without evaluation and communication, on one
    core a rank.

    Virtual workers share a core.

    Args:
        configs: the runs.
        virtual: whether their workers are.
    """
    depends_on = ("data", "data_dir", "validation", "model", "batch_size", "dtype")
    kinds: dict[str, tuple[int, float]] = {}
    total = 0.0
    for config in configs:
        kind = repr([getattr(config, name) for name in depends_on])
        if kind not in kinds:
            kinds[kind] = _measure(config)
        samples, step_s = kinds[kind]
        at_a_time = config.workers if virtual else 1 / config.island_size
        total += config.length(samples, config.workers)[1] * step_s * at_a_time
    return total


def _measure(config: RunConfig) -> tuple[int, float]:
    """Training samples, and seconds of a step.

    The quicker of two, since the first one has more to set up.
    """
    loaded = data.load(
        config.data,
        None if config.data_dir is None else Path(config.data_dir),
        validation=config.validation,
    )
    model = models.build(config.model, loaded.train_images.shape[1:], loaded.classes)
    batches = data.Batches(
        loaded.train_images, loaded.train_labels, batch_size=config.batch_size, seed=0
    )
    threads = torch.get_num_threads()
    step_s = float("inf")
    torch.set_num_threads(1)
    for _ in range(2):
        begin = time.perf_counter()
        batch_loss(model, *next(batches), DTYPES[config.dtype]).backward()
        step_s = min(step_s, time.perf_counter() - begin)
    torch.set_num_threads(threads)
    return len(loaded.train_labels), step_s
