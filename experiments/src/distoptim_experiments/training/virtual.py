"""A training run on virtual workers.

Data, models and records of `distoptim train`, another clock.
"""

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
from distoptim.simulator.cluster import Cluster
from distoptim_experiments import optimizers, records
from distoptim_experiments.config import DTYPES, POWERSGD, SYNCHRONOUS, RunConfig
from distoptim_experiments.data import datasets as data
from distoptim_experiments.data import partition
from distoptim_experiments.machines import Machines
from distoptim_experiments.models import registry as models
from distoptim_experiments.training import checkpoint, methods

Observer = Callable[[records.Line], None]
STATE = "state.pt"


def check_virtual(config: RunConfig) -> None:
    """Whether virtual workers can make a run.

    Raises:
        ValueError: something of it exists with real workers only.
    """
    if config.algorithm == POWERSGD:
        raise ValueError(
            "powersgd: torch's hook runs inside of DDP, which virtual workers do not have; "
            "use `distoptim train` or `compare`"
        )
    if config.slowdown != "none":
        raise ValueError(
            f"slowdown={config.slowdown!r} is for real workers; virtual ones have that of Machines"
        )
    for name in ("latency_ms", "bandwidth_gbit_s"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"{name}={getattr(config, name)!r} emulates a link between real workers; virtual ones "
                "have that of Machines"
            )
    if config.levels:
        raise ValueError(
            f"levels={config.levels!r}: virtual workers are in no process group that could be a part; "
            "use `distoptim train` or `compare`"
        )
    if config.island_size > 1:
        raise ValueError(
            f"island_size={config.island_size}: a virtual worker is one machine; use "
            "`distoptim train` or `compare`"
        )


class VirtualRun:
    """One run in one process.

    "ddp" averages the gradients before every step, and runs as Local SGD with tau = 1 on the clock:
    its messages are as large, and parameters that are equal stay so. It does not overlap with the
    backward pass.

    Args:
        config: the run.
        machines: the virtual machines.
        threads: workers computed at the same time.

    Raises:
        ValueError: see `check_virtual`.
    """

    def __init__(
        self, config: RunConfig, machines: Machines, *, threads: int | None = None
    ) -> None:
        check_virtual(config)
        self.config, self.machines = config, machines
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        folder = None if config.data_dir is None else Path(config.data_dir)
        self._data = loaded = _on(
            device, data.load(config.data, folder, validation=config.validation)
        )
        shards = partition.partition(
            config.partition, loaded.train_labels.cpu(), workers=config.workers, seed=config.seed
        )
        self._batches = [
            data.Batches(
                loaded.train_images[shard],
                loaded.train_labels[shard],
                batch_size=config.batch_size,
                seed=config.seed + 1 + rank,
                augment=config.augment,
            )
            for rank, shard in enumerate(shards)
        ]

        def model() -> nn.Module:
            torch.manual_seed(config.seed)
            return models.build(config.model, loaded.train_images.shape[1:], loaded.classes).to(
                device
            )

        self.cluster = Cluster(
            workers=config.workers,
            model=model,
            optimizer=self._optimizer,
            threads=threads,
            synchronous=config.algorithm == SYNCHRONOUS,
            compute=machines.compute(seed=config.seed),
            network=machines.network(),
        )
        self.steps_per_epoch, self.steps = config.length(len(loaded.train_labels), config.workers)
        self._schedule = config.learning_rate(
            steps=self.steps, steps_per_epoch=self.steps_per_epoch
        )
        self._losses: list[float] = []
        self._score: dict[str, Any] = {}

    def train(
        self,
        observer: Observer,
        *,
        label: str | None = None,
        save: Callable[[dict[str, Any]], object] = lambda state: None,
    ) -> None:
        """All steps that are left, or until no worker's loss is finite or no worker has finite
        parameters.

        Args:
            observer: gets the lines of the record.
            label: the run's name in tables; default its algorithm.
            save: gets `state_dict()` after every epoch.
        """
        cluster, every = self.cluster, self.config.evaluate_every or self.steps_per_epoch
        if cluster.steps == 0:
            observer(self._start(label))
        while cluster.steps < self.steps and self._step():
            step, at = cluster.steps, self._place()
            if step % self.config.log_every == 0 or step == self.steps:
                observer(records.Log(**at, loss=methods.mean_loss(self._losses)))
                self._losses.clear()
            if step % every == 0 or step == self.steps:
                self._score = self._evaluate()
                observer(records.Evaluation(**at, **self._score))
            if step % self.steps_per_epoch == 0 and step < self.steps:
                save(self.state_dict())
        observer(self._summary())

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit-equal."""
        return {
            "cluster": self.cluster.state_dict(),
            "batches": [b.state_dict() for b in self._batches],
            "losses": self._losses,
            "score": self._score,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.cluster.load_state_dict(state_dict["cluster"])
        for batches, saved in zip(self._batches, state_dict["batches"], strict=True):
            batches.load_state_dict(saved)
        self._losses, self._score = state_dict["losses"], state_dict["score"]

    def _step(self) -> bool:
        """One local step of all workers; whether the run can go on."""
        for optimizer in self.cluster.optimizers:
            self._schedule.set(optimizer, self.cluster.steps, self.config.peak_lr)
        try:
            losses = self.cluster.step(self._loss)
        except FloatingPointError:
            return False
        self._losses += losses
        return methods.goes_on(losses)

    def _place(self) -> dict[str, Any]:
        step = self.cluster.steps
        return {
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "seconds": self.cluster.seconds(),
        }

    def _evaluate(self) -> dict[str, Any]:
        workers = [methods.worker_accuracy(model, self._data) for model in self.cluster.models]
        return {
            **methods.score(self.cluster.mean_model(), self._data),
            "worker_accuracy": sum(workers) / len(workers),
        }

    def _start(self, label: str | None) -> records.Start:
        """Without the folder of the data, which is another one elsewhere."""
        return records.Start(
            label=label or self.config.algorithm,
            config=self.config.replace(data_dir=None),
            machines=self.machines,
            surroundings=records.surroundings(),
            steps=self.steps,
            steps_per_epoch=self.steps_per_epoch,
            parameters=sum(p.numel() for p in self.cluster.models[0].parameters()),
        )

    def _summary(self) -> records.Summary:
        stats = self.cluster.stats()
        rounds: dict[str, Any] = {name: stats[name] for name in ("tau", "staleness", "quarantined")}
        diverged = methods.diverged(
            self._score, self._data.classes, whole=self.cluster.steps >= self.steps
        )
        return records.Summary(
            step=self.cluster.steps,
            **self._score,
            diverged=diverged,
            seconds=stats["seconds"],
            exposed_s=stats["exposed_s"],
            # What the optimizer measures is this computer's time; no virtual worker's clock moves.
            overhead_s=0.0,
            hidden_s=stats["hidden_s"],
            bytes=int(stats["bytes"]),
            syncs=int(stats["syncs"]),
            **({} if self.config.synchronous else rounds),
        )

    def _optimizer(
        self, params: Iterable[Tensor], communicator: Communicator
    ) -> AveragingOptimizer:
        config = self.config
        if config.algorithm == SYNCHRONOUS:
            config = config.replace(algorithm="local-sgd", tau=1)
        optimizer = optimizers.build(config, params, communicator=communicator)
        assert isinstance(optimizer, AveragingOptimizer)
        return optimizer

    def _loss(self, model: nn.Module, rank: int) -> Any:
        return methods.batch_loss(model, *next(self._batches[rank]), DTYPES[self.config.dtype])


def run(
    config: RunConfig,
    machines: Machines,
    folder: Path,
    *,
    label: str | None = None,
    observers: Iterable[Observer] = (),
    threads: int | None = None,
) -> None:
    """Run and record; the record appears under its name only when it is whole. Killed, it goes on
    at the last epoch.

    Args:
        config: the run.
        machines: the virtual machines.
        folder: for the record.
        label: the run's name in tables; default its algorithm.
        observers: get every line too.
        threads: workers computed at the same time; default one per processor core.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draft, state = folder / records.DRAFT, folder / STATE
    made = VirtualRun(config, machines, threads=threads)
    resumed = state.exists()
    if resumed:
        made.load_state_dict(checkpoint.read(state))
    writer = records.RecordWriter(draft, after_step=made.cluster.steps if resumed else None)
    watching = [writer.write, *observers]

    def tell(line: records.Line) -> None:
        for watch in watching:
            watch(line)

    made.train(tell, label=label, save=lambda whole: checkpoint.replace(state, whole))
    writer.close()
    os.replace(draft, folder / records.FILE)
    state.unlink(missing_ok=True)


def _on(device: torch.device, loaded: data.Dataset) -> data.Dataset:
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
