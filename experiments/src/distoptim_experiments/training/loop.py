"""The training loop: train, evaluate the workers' mean, record, checkpoint, stop.

It is the same for real and for virtual workers; what differs is theirs, behind `Workers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from distoptim.optimizer import AveragingOptimizer
from distoptim_experiments import records
from distoptim_experiments.training import checkpoint
from distoptim_experiments.training.evaluation import diverged, mean_loss
from distoptim_experiments.training.workers import Workers

Observer = Callable[[records.Line], None]
TIMELINE = "timeline"
"""Below a run's folder: what each worker did when."""


class Run:
    """One process's part of a run; making it and all of its methods are collective.

    Args:
        workers: those that this process holds.
        folder: for record and checkpoints.
        observers: get every line of the record, on rank 0.
        resume: go on from the latest checkpoint in `folder`.
        label: the run's name in tables; default its algorithm.
        keep_checkpoint: leave one at the end, from which more steps can be made.

    Raises:
        ValueError: the checkpoint is damaged, or these workers cannot go on from it.
    """

    def __init__(
        self,
        workers: Workers,
        folder: Path,
        *,
        observers: Iterable[Observer] = (),
        resume: bool = False,
        label: str | None = None,
        keep_checkpoint: bool = True,
    ) -> None:
        self.workers = workers
        self.folder = folder
        # Of one that has come to a run that is on, the others'.
        self.step = workers.resumed(0)
        self._config = config = workers.problem.config
        self._label = label or config.algorithm
        self._keep_checkpoint = keep_checkpoint
        self._schedule = config.learning_rate(
            steps=workers.problem.steps, steps_per_epoch=workers.problem.steps_per_epoch
        )
        # Since the last line that tells their mean.
        self._losses: list[float] = []
        self._score: dict[str, float] = {}
        if resume:
            self._load()
        self._observers = list(observers)
        self._record: records.RecordWriter | None = None
        self._goes_on = resume
        if workers.seat.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self._goes_on = resume or (self.step > 0 and (folder / records.FILE).exists())
            self._record = records.RecordWriter(
                folder / records.FILE, after_step=self.step if self._goes_on else None
            )
            self._observers.insert(0, self._record.write)

    def train(self) -> int:
        """All steps that are left; returns the signal that stopped them early, after a checkpoint,
        or 0.

        A run that diverges ends early too, once no worker's loss is finite or no worker has finite
        parameters.
        """
        self._introduce()
        for optimizer in self.workers.optimizers if self._config.timeline else ():
            # Others, of DDP, know nothing of rounds.
            if isinstance(optimizer, AveragingOptimizer):
                optimizer.record(self.folder / TIMELINE)
        self.workers.begin()
        try:
            signum = self._steps()
        except FloatingPointError:
            # Raised on all workers at the same step.
            signum = 0
        if not signum:
            self._summarise()
            if not self._keep_checkpoint:
                checkpoint.remove(self.folder)
        return signum

    def close(self) -> None:
        """Leave the communication groups and close the record."""
        self.workers.close()
        if self._record is not None:
            self._record.close()

    def _steps(self) -> int:
        steps = self.workers.problem.steps
        every = self._config.evaluate_every or self.workers.problem.steps_per_epoch
        if self.step >= steps:
            self._evaluate()
        while self.step < steps:
            before = self.step
            losses = self._one_step()
            last = self.step >= steps
            if last or self._has_passed(self._config.log_every, before):
                self._log()
            if last or self._has_passed(every, before):
                self._evaluate()
            signum = self.workers.verdict(losses)
            if signum or self._is_checkpoint_due(before):
                self._save()
            if signum:
                return signum
        return 0

    def _one_step(self) -> list[float]:
        """A local step of every worker; returns the losses of those held here."""
        for optimizer in self.workers.optimizers:
            self._schedule.set(optimizer, self.step, self._config.peak_lr)
        losses = list(self.workers.step(self.step))
        self.step = self.workers.reached(self.step)
        self._losses += losses
        for line in self.workers.events():
            self._write(line)
        return losses

    def _has_passed(self, every: int, before: int) -> bool:
        """Whether a multiple of so many local steps was reached since, also where one has jumped over it."""
        return self.step // every > before // every

    def _is_checkpoint_due(self, before: int) -> bool:
        if self.step >= self.workers.problem.steps:
            return self._keep_checkpoint
        every = self._config.checkpoint_every
        if every is None:
            every = self.workers.problem.steps_per_epoch
        return every > 0 and self._has_passed(every, before)

    # ---- the lines of the record ------------------------------------------------------------------

    def _tell(self, kind: type[records.Line], **values: Any) -> None:
        if self.workers.seat.rank == 0:
            self._write(kind(step=self.step, **values))

    def _write(self, line: records.Line) -> None:
        for observer in self._observers:
            observer(line)

    def _introduce(self) -> None:
        config = self._config
        if self.workers.machines is not None:
            # Results of virtual machines do not depend on where the data lie.
            config = config.replace(data_dir=None)
        common = {
            "config": config,
            "surroundings": records.surroundings(),
            "steps": self.workers.problem.steps,
        }
        if self._goes_on:
            self._tell(records.Resume, **common)
        else:
            self._tell(
                records.Start,
                label=self._label,
                machines=self.workers.machines,
                steps_per_epoch=self.workers.problem.steps_per_epoch,
                parameters=self.workers.parameters,
                **common,
            )

    def _at(self) -> dict[str, float]:
        return {
            "epoch": self.step / self.workers.problem.steps_per_epoch,
            "seconds": self.workers.seconds(),
        }

    def _log(self) -> None:
        so_far = self.workers.so_far()
        self._tell(records.Log, **self._at(), loss=mean_loss(self._losses), **so_far)
        self._losses.clear()

    def _evaluate(self) -> None:
        self._score = self.workers.evaluate()
        self._tell(records.Evaluation, **self._at(), **self._score)

    def _summarise(self) -> None:
        totals = self.workers.totals()
        problem = self.workers.problem
        if self.workers.seat.rank == 0:
            whole = self.step >= problem.steps
            self._tell(
                records.Summary,
                **self._score,
                diverged=diverged(self._score, problem.data.classes, whole=whole),
                **totals,
            )

    # ---- checkpoints ------------------------------------------------------------------------------

    def _save(self) -> None:
        state = {
            "losses": self._losses,
            "score": self._score,
            "workers": self.workers.state_dict(),
        }
        path = checkpoint.save(
            self.folder,
            seat=self.workers.seat,
            step=self.step,
            state=state,
            barrier=self.workers.barrier,
        )
        self._tell(records.Checkpoint, path=str(path.relative_to(self.folder)))

    def _load(self) -> None:
        state, own = checkpoint.load(self.folder, seat=self.workers.seat)
        self.workers.load_state_dict(state["workers"], own=own)
        # Of one that comes and goes the run may be further than its file.
        self.step = self.workers.resumed(state["step"])
        self._score = state["score"]
        if own:
            self._losses = state["losses"]
