"""Averaging optimizers in Lightning: a strategy that averages, and a callback that validates the mean."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch

from distoptim.integrations import hooks, loop, worker_files
from distoptim.optimizer import AveragingOptimizer, averaged, consolidate

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.strategies import DDPStrategy
except ImportError as error:
    raise hooks.unusable("lightning", error) from error

hooks.check(
    "lightning",
    {
        DDPStrategy: (
            "configure_ddp",
            "lightning_module_state_dict",
            "load_checkpoint",
            "load_optimizer_state_dict",
            "on_train_batch_start",
            "on_train_end",
            "on_train_start",
            "optimizer_step",
            "precision_plugin",
            "remove_checkpoint",
            "save_checkpoint",
            "setup_optimizers",
        ),
        Callback: (
            "on_exception",
            "on_train_batch_end",
            "on_validation_end",
            "on_validation_start",
            "setup",
        ),
    },
)


@final
class AveragingStrategy(DDPStrategy):
    """One process per device, as DDPStrategy starts them, and no DDP: optimizers of distoptim average.

    Each optimizer step counts once, skipped ones too. A checkpoint's weights are the workers' mean; the
    workers' own are in the folder "NAME.ckpt.workers" beside it, from which `ckpt_path=` goes on bit-equal,
    or on another number of workers from the anchor. After `fit` all workers hold the mean.

    Args: DDPStrategy's, of which those about DDP itself have no effect.
    """

    strategy_name = "distoptim"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._resumes_from: Path | None = None
        self._beside: dict[str, Any] | None = None
        # The local step of each optimizer, as it was after ours.
        self._counted: dict[AveragingOptimizer, int] = {}

    def configure_ddp(self) -> None:
        """No DDP: gradients stay a worker's own."""

    def setup_optimizers(self, trainer: Any) -> None:
        """Lightning's.

        Raises:
            ValueError: one is none of distoptim's, so that what it trains would never be averaged; or its
                tau follows the loss.
        """
        super().setup_optimizers(trainer)
        self._counted.clear()
        for optimizer in self.optimizers:
            if not isinstance(optimizer, AveragingOptimizer):
                raise ValueError(
                    f"AveragingStrategy with {type(optimizer).__name__}, whose parameters would stay each "
                    "worker's own: allowed are optimizers of distoptim from configure_optimizers()"
                )
            loop.check(optimizer)
        if not any(isinstance(callback, AveragingCallback) for callback in trainer.callbacks):
            warnings.warn(
                "AveragingStrategy without AveragingCallback: validation, early stopping and the best "
                "checkpoint see each worker's own model; Trainer(callbacks=[AveragingCallback()])",
                RuntimeWarning,
                stacklevel=2,
            )

    @property
    def averaging(self) -> dict[str, AveragingOptimizer]:
        """The optimizers by number; none before `fit`."""
        return {str(i): optimizer for i, optimizer in enumerate(self.optimizers)}

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """A block in which the module is the workers' mean; as is before `fit`."""
        optimizers = self.averaging.values()
        if not optimizers:
            return contextlib.nullcontext()
        return averaged(self.lightning_module, *optimizers)

    def optimizer_step(self, optimizer: Any, *args: Any, **options: Any) -> Any:
        """A local step, which counts.

        Raises:
            RuntimeError: somebody else has called `average()` too.
        """
        if optimizer.local_step != self._counted.get(optimizer, optimizer.local_step):
            raise RuntimeError(
                "average() was called beside AveragingStrategy, which averages at every optimizer step: leave "
                "average() away"
            )
        out = super().optimizer_step(optimizer, *args, **options)
        optimizer.average()
        self._counted[optimizer] = optimizer.local_step
        return out

    def on_train_end(self) -> None:
        """The module holds the workers' mean from here on."""
        super().on_train_end()
        if self.averaging:
            consolidate(self.lightning_module, *self.averaging.values())

    # ---- checkpoints ------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Of the workers' mean; on all workers."""
        with self.averaged():
            return copy.deepcopy(super().lightning_module_state_dict())

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Lightning's, of rank 0, and each worker's own."""
        if self.averaging and "optimizer_states" in checkpoint:
            beside = {
                "schedulers": checkpoint.get("lr_schedulers", []),
                # With the state of a loader that has one: of all workers Lightning saves rank 0's.
                "loop": checkpoint["loops"]["fit_loop"],
                # A GradScaler that has skipped a step has another scale than the others'.
                "precision": self.precision_plugin.state_dict(),
                # Of dropout; Lightning saves none.
                "generators": _generators(),
            }
            worker_files.write(_own(filepath), self.lightning_module, self.averaging, beside)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def remove_checkpoint(self, filepath: Any) -> None:
        """Lightning's, and each worker's own."""
        if self.averaging:
            worker_files.remove(_own(filepath), self.averaging)
        super().remove_checkpoint(filepath)
        self.barrier()
        if self.is_global_zero and _own(filepath).exists():
            _own(filepath).rmdir()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Lightning's; notes what it is."""
        # "last.ckpt" may be a link.
        self._resumes_from = _own(Path(checkpoint_path).resolve())
        return super().load_checkpoint(checkpoint_path, weights_only)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each worker's own model, which is the mean so far, its optimizers, and its place in its data."""
        self._counted.clear()
        if self._resumes_from is None:
            super().load_optimizer_state_dict(checkpoint)
            return
        self._beside = worker_files.read(self._resumes_from, self.lightning_module, self.averaging)
        if self._beside is not None and "loop" in self._beside:
            self.lightning_module.trainer.fit_loop.load_state_dict(self._beside["loop"])

    def on_train_start(self) -> None:
        """After all was loaded: schedulers and scaler are each worker's own too."""
        super().on_train_start()
        if self._beside is not None:
            self.precision_plugin.load_state_dict(self._beside.get("precision", {}))
            trainer = self.lightning_module.trainer
            for config, state in zip(
                trainer.lr_scheduler_configs, self._beside["schedulers"], strict=True
            ):
                config.scheduler.load_state_dict(state)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """The first time after a checkpoint: behind the loader, which has drawn a number by then."""
        super().on_train_batch_start(batch, batch_idx)
        if self._beside is not None:
            _set_generators(self._beside.get("generators", {}))
            self._beside = None


@final
class AveragingCallback(Callback):
    """Validation within `fit` sees the workers' mean, so also early stopping and the best checkpoint.

    Logs what the optimizers have measured under "distoptim/...".
    """

    def __init__(self) -> None:
        self._block = contextlib.ExitStack()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Look at the strategy.

        Raises:
            ValueError: it is another one.
        """
        if not isinstance(trainer.strategy, AveragingStrategy):
            raise ValueError(
                f"AveragingCallback with {type(trainer.strategy).__name__}: allowed is "
                "Trainer(strategy=AveragingStrategy())"
            )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log, as often as Lightning logs."""
        for number, optimizer in trainer.strategy.averaging.items():
            values = loop.logged(optimizer)
            suffix = f"/{number}" if len(trainer.optimizers) > 1 else ""
            pl_module.log_dict({name + suffix: value for name, value in values.items()})

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Parameters become the mean."""
        # After fit they are it already.
        if trainer.state.fn == "fit":
            self._block.enter_context(trainer.strategy.averaged())

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Parameters become local again."""
        self._block.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The same; communicates nothing."""
        self._block.close()


def _generators() -> dict[str, torch.Tensor]:
    """States of torch's, by device."""
    out = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        out["cuda"] = torch.cuda.get_rng_state()
    return out


def _set_generators(states: dict[str, torch.Tensor]) -> None:
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _own(filepath: Any) -> Path:
    """The folder of the workers' own files."""
    return Path(f"{filepath}.workers")
