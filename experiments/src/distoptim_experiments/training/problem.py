"""What is learned, and who gets which part of it: the same for real and for virtual workers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from distoptim_experiments.config import RunConfig
from distoptim_experiments.data import datasets, partition
from distoptim_experiments.models import registry


class Problem:
    """A run's data set, dealt out to its workers, and its model.

    Args:
        config: the run.
        device: where data and models are.

    Attributes:
        data: the data set.
        steps_per_epoch, steps: local steps of each worker, in an epoch and in the whole run.

    Raises:
        ValueError: there is no such data set, one of its files is missing or damaged, or a worker
            would get nothing.
    """

    def __init__(self, config: RunConfig, *, device: torch.device | None = None) -> None:
        self.config = config
        folder = None if config.data_dir is None else Path(config.data_dir)
        loaded = datasets.load(config.data, folder, validation=config.validation)
        self._deals: dict[int, list[torch.Tensor]] = {}
        self._labels = loaded.train_labels
        self._deal(config.workers)
        self._device = device or torch.device("cpu")
        self.data = _on(self._device, loaded)
        self.steps_per_epoch, self.steps = config.length(len(loaded.train_labels), config.workers)

    def _deal(self, workers: int) -> list[torch.Tensor]:
        """The samples of each of so many workers."""
        if workers not in self._deals:
            self._deals[workers] = partition.partition(
                self.config.partition, self._labels, workers=workers, seed=self.config.seed
            )
        return self._deals[workers]

    def batches(self, worker: int, *, of: int | None = None, turn: int = 0) -> datasets.Batches:
        """A worker's samples, in its order.

        Args:
            worker: which.
            of: how many workers; default as many as the run has.
            turn: a number that gives another order.
        """
        shard = self._deal(of or self.config.workers)[worker]
        return datasets.Batches(
            self.data.train_images[shard],
            self.data.train_labels[shard],
            batch_size=self.config.batch_size,
            seed=self.config.seed + 1 + worker + 1000 * turn,
            augment=self.config.augment,
        )

    def model(self) -> nn.Module:
        """The model with its first weights, equal at each call; seeds torch's global generator."""
        torch.manual_seed(self.config.seed)
        shape = self.data.train_images.shape[1:]
        return registry.build(self.config.model, shape, self.data.classes).to(self._device)


def _on(device: torch.device, loaded: datasets.Dataset) -> datasets.Dataset:
    """The data set on a device."""
    held = loaded.validation
    return replace(
        loaded,
        train_images=loaded.train_images.to(device),
        train_labels=loaded.train_labels.to(device),
        test_images=loaded.test_images.to(device),
        test_labels=loaded.test_labels.to(device),
        validation=held and (held[0].to(device), held[1].to(device)),
    )
