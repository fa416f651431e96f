"""The training loop of both commands.

Train, keep time, evaluate the workers' mean, record, checkpoint, stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from distoptim_experiments import records
from distoptim_experiments.config import RunConfig
from distoptim_experiments.data import datasets as data
from distoptim_experiments.data import partition
from distoptim_experiments.models import registry as models
from distoptim_experiments.training import checkpoint, islands, methods, slowdown
from distoptim_experiments.training.world import StopSignals, StopVote, World

Observer = Callable[[records.Line], None]


@dataclass
class Place:
    """Where a run is.

    The local step, the losses since the last log line, the seconds of the training steps, and what
    communication had cost before this process.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    before: methods.Costs = field(default_factory=methods.Costs)


class Run:
    """One rank's part of a run; making it and all of its methods are collective.

    The clock of a training step covers everything from fetching the batch to the end of
    `average()`. Evaluation and checkpoints lie outside of it, between barriers, so that no worker's
    waiting for them is counted.

    Args:
        config: the run.
        world: the workers.
        folder: for record and checkpoints.
        observers: get every line of the record, on rank 0.
        resume: go on from the latest checkpoint in `folder`.
        label: the run's name in tables; default its algorithm.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        folder: Path,
        *,
        observers: Sequence[Observer] = (),
        resume: bool = False,
        label: str | None = None,
    ) -> None:
        self.config, self.world, self.folder, self.label = (
            config,
            world,
            folder,
            label or config.algorithm,
        )
        self._data = data.load(
            config.data,
            None if config.data_dir is None else Path(config.data_dir),
            validation=config.validation,
        )
        shard = partition.partition(
            config.partition, self._data.train_labels, workers=world.workers, seed=config.seed
        )[world.worker]
        self._batches = data.Batches(
            self._data.train_images[shard],
            self._data.train_labels[shard],
            batch_size=config.batch_size,
            seed=config.seed + 1 + world.worker,
            augment=config.augment,
        )
        torch.manual_seed(config.seed)
        self.model = models.build(
            config.model, self._data.train_images.shape[1:], self._data.classes
        )
        self._method = methods.build(self.model, config)
        self._place = Place()
        self._score: dict[str, float] = {}
        self.steps_per_epoch, self.steps = config.length(
            len(self._data.train_labels), world.workers
        )
        self._schedule = config.learning_rate(
            steps=self.steps, steps_per_epoch=self.steps_per_epoch
        )
        if resume:
            self._load()
        self._observers = list(observers)
        if world.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self._record = records.RecordWriter(
                folder / records.FILE, after_step=self._place.step if resume else None
            )
            self._observers.insert(0, self._record.write)

    def train(self, signals: StopSignals) -> int:
        """All steps that are left; returns the signal that stopped them early, after a checkpoint,
        or 0.

        A run that diverges ends early too, once no worker's loss is finite or no worker has finite
        parameters.
        """
        self._introduce()
        vote = StopVote(self.world, signals)
        self.model.train()
        self.world.barrier()
        try:
            signum = self._steps(vote)
        except FloatingPointError:
            # Raised on all workers at the same step.
            signum = 0
        if not signum:
            self._summarise()
            # Too late to stop: what is told now is only read, so that nothing stays in flight.
            vote.close()
        return signum

    def _steps(self, vote: StopVote) -> int:
        every = self.config.evaluate_every or self.steps_per_epoch
        save_every = (
            self.steps_per_epoch
            if self.config.checkpoint_every is None
            else self.config.checkpoint_every
        )
        first = self._place.step
        if first >= self.steps:
            self._evaluate()
        while self._place.step < self.steps:
            step_s = self._step()
            step, loss = self._place.step, self._place.losses[-1]
            if step % self.config.log_every == 0 or step == self.steps:
                self._log()
            if step % every == 0 or step == self.steps:
                self._evaluate()
            signum = vote.verdict(step - first, step_s, methods.goes_on([loss]))
            if signum or step == self.steps or (save_every and step % save_every == 0):
                self._save()
            if signum:
                return signum
        return 0

    def close(self) -> None:
        """Leave the communication groups and close the record."""
        self._method.close()
        if self.world.rank == 0:
            self._record.close()

    def _step(self) -> float:
        place = self._place
        begin = time.perf_counter()
        self._delay()
        self._schedule.set(self._method.optimizer, place.step, self.config.peak_lr)
        loss = self._method.step(*next(self._batches))
        seconds = time.perf_counter() - begin
        place.step += 1
        place.losses.append(loss)
        place.seconds += seconds
        return seconds

    def _delay(self) -> None:
        config = self.config
        late_s = slowdown.seconds(
            config.slowdown,
            mean_ms=config.slowdown_ms,
            seed=config.seed,
            rank=self.world.worker,
            step=self._place.step,
        )
        if late_s:
            time.sleep(late_s)

    def _costs(self) -> methods.Costs:
        """Since the start of the run, over all processes that made it."""
        return self._place.before + self._method.costs()

    def _tell(self, kind: type[records.Line], **values: Any) -> None:
        if self.world.rank == 0:
            line = kind(step=self._place.step, **values)
            for observer in self._observers:
                observer(line)

    def _introduce(self) -> None:
        if self._place.step:
            self._tell(
                records.Resume,
                config=self.config,
                surroundings=records.surroundings(),
                steps=self.steps,
            )
        else:
            self._tell(
                records.Start,
                label=self.label,
                config=self.config,
                surroundings=records.surroundings(),
                steps=self.steps,
                steps_per_epoch=self.steps_per_epoch,
                parameters=sum(p.numel() for p in self.model.parameters()),
            )

    def _log(self) -> None:
        losses = self._place.losses
        self._tell(
            records.Log,
            epoch=self._place.step / self.steps_per_epoch,
            seconds=self._place.seconds,
            loss=methods.mean_loss(losses),
        )
        losses.clear()

    def _evaluate(self) -> None:
        workers = self.world.gather(methods.worker_accuracy(self.model, self._data))
        with self._method.averaged():
            # All ranks of a worker, since FSDP2 gathers parameters from all of them.
            if self.world.worker == 0:
                score = {
                    **methods.score(self.model, self._data),
                    "worker_accuracy": sum(workers) / len(workers),
                }
                self._tell(
                    records.Evaluation,
                    epoch=self._place.step / self.steps_per_epoch,
                    seconds=self._place.seconds,
                    **score,
                )
                self._score = score
        self.world.barrier()

    def _summarise(self) -> None:
        """Seconds are means over the ranks, bytes are each worker's, of all its ranks.

        Syncs and what is told of rounds are rank 0's.
        """
        costs = self.world.gather({"seconds": self._place.seconds, **asdict(self._costs())})
        if self.world.rank == 0:
            diverged = methods.diverged(
                self._score, self._data.classes, whole=self._place.step >= self.steps
            )
            self._tell(
                records.Summary,
                **self._score,
                diverged=diverged,
                **{
                    name: _mean([cost[name] for cost in costs])
                    for name in ("seconds", "exposed_s", "overhead_s", "hidden_s")
                },
                syncs=costs[0]["syncs"],
                bytes=sum(cost["bytes"] for cost in costs[: self.world.island_size]),
                **self._method.stats(),
            )

    def _save(self) -> None:
        place = self._place
        path = checkpoint.save(
            self.folder,
            world=self.world,
            step=place.step,
            state={
                **islands.state_dict(self.model, self._method.optimizer, self.config),
                "method": self._method.state_dict(),
                "batches": self._batches.state_dict(),
                "rng": torch.get_rng_state(),
                "losses": place.losses,
                "seconds": place.seconds,
                "costs": asdict(self._costs()),
            },
        )
        self._tell(records.Checkpoint, path=str(path.relative_to(self.folder)))

    def _load(self) -> None:
        state, mine = checkpoint.load(self.folder, world=self.world)
        islands.load_state_dict(self.model, self._method.optimizer, self.config, state)
        self._place.step = state["step"]
        self._place.seconds = state["seconds"]
        self._place.before = methods.Costs(**state["costs"])
        torch.set_rng_state(state["rng"])
        if mine:
            self._batches.load_state_dict(state["batches"])
            self._method.load_state_dict(state["method"])
            self._place.losses = state["losses"]


def _mean(values: Sequence[float | None]) -> float | None:
    """None where it is not measured."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
