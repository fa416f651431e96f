"""A training run on virtual workers: data, models and records of `distoptim train`, another clock."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distoptim.comm import Communicator
from distoptim.optimizer import AveragingOptimizer
from distoptim.sim.cluster import Cluster
from distoptim.sim.machines import Machines
from distoptim.train import data, methods, models, optimizers, records
from distoptim.train.config import DTYPES, RunConfig

Observer = Callable[[records.Line], None]


class VirtualRun:
    """One run in one process.

    "ddp" averages the gradients before every step, and runs as Local SGD with tau = 1 on the clock: its messages are
    as large, and parameters that are equal stay so. It does not overlap with the backward pass.

    Args:
        config: the run; its emulated link is not used.
        machines: the virtual machines.
        threads: workers computed at the same time.

    Raises:
        ValueError: the algorithm exists with real workers only.
    """

    def __init__(self, config: RunConfig, machines: Machines, *, threads: int | None = None) -> None:
        if config.algorithm == optimizers.POWERSGD:
            raise ValueError("powersgd: torch's hook runs inside of DDP, which virtual workers do not have; "
                             "use `distoptim train` or `compare`")
        if config.slowdown != "none":
            raise ValueError(f"slowdown={config.slowdown!r} is for real workers; virtual ones have that of Machines")
        self.config, self.machines = config, machines
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded = data.load(config.data, None if config.data_dir is None else Path(config.data_dir))
        images, labels = loaded.train_images.to(device), loaded.train_labels.to(device)
        shards = data.partition(config.partition, loaded.train_labels, workers=config.workers, seed=config.seed)
        self._batches = [data.Batches(images[shard], labels[shard], batch_size=config.batch_size,
                                      seed=config.seed + 1 + rank, augment=config.augment)
                         for rank, shard in enumerate(shards)]
        self._test = loaded.test_images.to(device), loaded.test_labels.to(device)

        def model() -> nn.Module:
            torch.manual_seed(config.seed)
            return models.build(config.model, loaded.train_images.shape[1:], loaded.classes).to(device)

        self.cluster = Cluster(workers=config.workers, model=model, optimizer=self._optimizer, threads=threads,
                               synchronous=config.algorithm == optimizers.SYNCHRONOUS,
                               compute=machines.compute(seed=config.seed), network=machines.network())
        self.steps_per_epoch = max(1, len(labels) // (config.workers * config.batch_size))
        self.steps = config.steps or config.epochs * self.steps_per_epoch

    def train(self, observer: Observer) -> None:
        """All steps; `observer` gets the lines of the record."""
        config, cluster = self.config, self.cluster
        every = config.evaluate_every or self.steps_per_epoch
        observer({"kind": "start", "step": 0, "config": config.to_dict(), "machines": self.machines.to_dict(),
                  **records.surroundings(), "workers": config.workers, "steps": self.steps,
                  "steps_per_epoch": self.steps_per_epoch,
                  "parameters": sum(p.numel() for p in cluster.models[0].parameters())})
        losses: list[float] = []
        score: dict[str, float] = {}
        for step in range(1, self.steps + 1):
            losses += cluster.step(self._loss)
            at = {"step": step, "epoch": step / self.steps_per_epoch, "seconds": cluster.seconds()}
            if step % config.log_every == 0 or step == self.steps:
                observer({"kind": "log", **at, "loss": sum(losses) / len(losses)})
                losses.clear()
            if step % every == 0 or step == self.steps:
                score = methods.evaluate(cluster.mean_model(), *self._test)
                observer({"kind": "evaluation", **at, **score})
        stats = cluster.stats()
        computation = stats["seconds"] - stats["exposed_s"]
        observer({"kind": "summary", "step": self.steps, **score, "seconds": stats["seconds"],
                  "exposed_s": stats["exposed_s"], "computation_s": computation,
                  "exposed_share": stats["exposed_s"] / computation, "bytes": int(stats["bytes"]),
                  "syncs": int(stats["syncs"]), "stats": stats})

    def _optimizer(self, params: Iterable[Tensor], communicator: Communicator) -> AveragingOptimizer:
        config = self.config
        if config.algorithm == optimizers.SYNCHRONOUS:
            config = replace(config, algorithm="local-sgd", tau=1)
        optimizer = optimizers.build(config, params, communicator=communicator)
        assert isinstance(optimizer, AveragingOptimizer)
        return optimizer

    def _loss(self, model: nn.Module, rank: int) -> Any:
        return methods.batch_loss(model, *next(self._batches[rank]), DTYPES[self.config.dtype])


def run(config: RunConfig, machines: Machines, folder: Path, *, observers: Iterable[Observer] = (),
        threads: int | None = None) -> None:
    """Run and record; the record appears under its name only when it is whole.

    Args:
        config: the run.
        machines: the virtual machines.
        folder: for the record.
        observers: get every line too.
        threads: workers computed at the same time; default one per processor core.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{records.FILE}.draft"
    writer = records.RecordWriter(draft)
    watching = [writer.write, *observers]

    def tell(line: records.Line) -> None:
        for watch in watching:
            watch(line)

    VirtualRun(config, machines, threads=threads).train(tell)
    writer.close()
    os.replace(draft, folder / records.FILE)
