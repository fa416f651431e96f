"""Averaging optimizers in Hugging Face's Trainer: `AveragingTrainer`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import torch

from distoptim.integrations import hooks, loop, worker_files
from distoptim.optimizer import AveragingOptimizer

try:
    from transformers import Trainer, TrainingArguments
except ImportError as error:
    raise hooks.unusable("transformers", error) from error

from distoptim.integrations.accelerate import AveragedOptimizer, prepare

hooks.check(
    "transformers",
    {
        TrainingArguments: ("average_tokens_across_devices", "deepspeed", "fsdp"),
        Trainer: (
            "create_accelerator_and_postprocess",
            "create_optimizer",
            "evaluation_loop",
            "log",
            "save_model",
            "train",
            "_load_optimizer_and_scheduler",
            "_load_scaler",
            "_save_optimizer_and_scheduler",
        ),
    },
)

Averaging = Callable[[torch.optim.Optimizer], AveragingOptimizer]


class AveragingTrainer(Trainer):
    """A Trainer whose workers average every tau steps instead of at each.

    Evaluation, prediction, `save_model`, checkpoints' weights and the choice of the best model see the
    workers' mean; so does the model after `train()`. Each worker keeps its own beside a checkpoint, and
    resumes from it bit-equal. Logs have `distoptim/...`.

    To be subclassed as Trainer is. A subclass of Trainer becomes one of this by
    `class Mine(AveragingTrainer, Seq2SeqTrainer): pass`.

    Args:
        args: as Trainer's, first too; without deepspeed and FSDP. `average_tokens_across_devices` is
            turned off: each worker divides by its own number of tokens.
        averaging: inner optimizer -> optimizer of distoptim, for the one that `args.optim` makes. Or
            hand one over in `optimizers=`, made after the arguments, which start the process group.
        options: Trainer's.

    Raises:
        ValueError: deepspeed or FSDP; an optimizer that is none of distoptim's.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        averaging: Averaging | None = None,
        **options: Any,
    ) -> None:
        if args is not None and (args.deepspeed or args.fsdp):
            raise ValueError(
                "args.deepspeed or args.fsdp: they keep one model over several processes, none of which "
                "is a worker; allowed are arguments without"
            )
        given, _ = options.get("optimizers", (None, None))
        if averaging is None and not isinstance(given, AveragingOptimizer):
            raise ValueError(
                f"optimizers=({given!r}, ...): allowed is an optimizer of distoptim, or averaging=, which "
                "makes one around what args.optim says"
            )
        self._averaging = averaging
        super().__init__(model, args, **options)
        self.args.average_tokens_across_devices = False

    def create_accelerator_and_postprocess(self) -> None:
        """The accelerator puts no DDP around the model."""
        super().create_accelerator_and_postprocess()
        accelerator = self.accelerator
        accelerator.prepare = lambda *args, **_: prepare(accelerator, *args)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's, and the averaging one around it."""
        made = super().create_optimizer(model)
        if self._averaging is not None and self._optimizer() is None:
            self.optimizer = self._averaging(made)
        return self.optimizer

    def _optimizer(self) -> AveragingOptimizer | None:
        """The averaging optimizer, prepared or not; None before it is made."""
        found = self.optimizer
        if isinstance(found, AveragedOptimizer):
            found = found.optimizer
        return found if isinstance(found, AveragingOptimizer) else None

    def _mean(self) -> contextlib.AbstractContextManager[None]:
        """A block in which the model is the workers' mean; inside another one, and before training, as is."""
        optimizer = self._optimizer()
        if optimizer is None or optimizer.engine.evaluating:
            return contextlib.nullcontext()
        return optimizer.averaged(self.model)

    def train(self, *args: Any, **options: Any) -> Any:
        """Trainer's; the model holds the workers' mean afterwards."""
        out = super().train(*args, **options)
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer.consolidate(self.model)
        return out

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """Of the workers' mean."""
        with self._mean():
            return super().evaluation_loop(*args, **options)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The workers' mean; on all workers."""
        with self._mean():
            super().save_model(output_dir, _internal_call)

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Of training, also what the optimizer has measured."""
        optimizer = self._optimizer()
        if optimizer is not None and "loss" in logs:
            logs |= loop.logged(optimizer)
        super().log(logs, *args, **options)

    # ---- checkpoints; Trainer's hooks for subclasses -----------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            scaler = self.accelerator.scaler
            beside = {
                "scheduler": self.lr_scheduler.state_dict(),
                "scaler": scaler and scaler.state_dict(),
            }
            worker_files.write(Path(output_dir), self.model, {"0": optimizer}, beside)
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer = self._optimizer()
        prepared: Any = self.optimizer
        self._beside: dict[str, Any] | None = None
        if checkpoint is None or optimizer is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        resume = _Resume(Path(checkpoint), self.model, optimizer)
        prepared.resume_from(resume)
        super()._load_optimizer_and_scheduler(checkpoint)
        # A folder of weights alone has none that Trainer would load.
        resume.load()
        if resume.beside is not None:
            self._beside = resume.beside
            self.lr_scheduler.load_state_dict(self._beside["scheduler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        super()._load_scaler(checkpoint)
        if self._beside is not None and self._beside["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(self._beside["scaler"])


@final
class _Resume:
    """Loads a worker's own when Trainer comes to load the optimizer, whose file is rank 0's."""

    def __init__(self, folder: Path, model: torch.nn.Module, optimizer: AveragingOptimizer) -> None:
        self._folder: Path | None = folder
        self._model = model
        self._optimizer = optimizer
        self.beside: dict[str, Any] | None = None

    def load(self) -> None:
        """Once."""
        if self._folder is not None:
            self.beside = worker_files.read(self._folder, self._model, {"0": self._optimizer})
            self._folder = None

    def finish(self) -> None:
        """At the next step nothing is left to do."""
