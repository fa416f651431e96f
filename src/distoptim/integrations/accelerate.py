"""Averaging optimizers under Hugging Face Accelerate: `prepare` instead of `accelerator.prepare`."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any, NoReturn, Protocol, final

import torch

from distoptim.integrations import hooks, loop, worker_files
from distoptim.optimizer import AveragingOptimizer, averaged

try:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
except ImportError as error:
    raise hooks.unusable("accelerate", error) from error

hooks.check(
    "accelerate",
    {
        Accelerator: (
            "distributed_type",
            "prepare_model(evaluation_mode)",
            "prepare_optimizer",
            "register_save_state_pre_hook",
            "register_load_state_pre_hook",
        ),
        AcceleratedOptimizer: ("step", "load_state_dict", "state", "param_groups"),
    },
)


class Resume(Protocol):
    """A checkpoint that is being loaded."""

    def load(self) -> None:
        """The framework comes to the optimizer: load this worker's own, once."""

    def finish(self) -> None:
        """The framework has loaded all."""


@final
class AveragedOptimizer(AcceleratedOptimizer):
    """An averaging optimizer as Accelerate prepares optimizers: each step counts and averages.

    Micro-steps of an accumulation do not count; steps that a GradScaler skips do, so that workers stay in
    phase.

    Args:
        optimizer: of distoptim.
        scaler: the accelerator's.
    """

    def __init__(self, optimizer: AveragingOptimizer, scaler: Any) -> None:
        super().__init__(optimizer, device_placement=False, scaler=scaler)
        # Accelerate's mark of what it need not wrap.
        self._is_accelerate_prepared = True
        self._checkpoint: Resume | None = None

    def step(self, closure: Any = None) -> None:
        """One local step, if gradients are complete, and what `average()` does."""
        if self._checkpoint is not None:
            self._checkpoint.finish()
            self._checkpoint = None
        super().step(closure)
        if self.gradient_state.sync_gradients:
            self.optimizer.average()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """This worker's own state, where `load_state` is loading a checkpoint; else the one given."""
        if self._checkpoint is None:
            super().load_state_dict(state_dict)
        else:
            self._checkpoint.load()

    def resume_from(self, checkpoint: Resume) -> None:
        """Note from where the next `load_state_dict` loads."""
        self._checkpoint = checkpoint

    def average(self, **_: Any) -> NoReturn:
        """Refused.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("step() of a prepared optimizer averages already: leave average() away")

    def averaged(
        self, module: torch.nn.Module | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """As `AveragingOptimizer.averaged`; modules as the accelerator has prepared them."""
        block: contextlib.AbstractContextManager[None] = self.optimizer.averaged(module)
        return block

    def consolidate(self, module: torch.nn.Module | None = None) -> None:
        """As `AveragingOptimizer.consolidate`."""
        self.optimizer.consolidate(module)

    def average_module(self, module: torch.nn.Module) -> None:
        """As `AveragingOptimizer.average_module`."""
        self.optimizer.average_module(module)

    def flush(self) -> None:
        """As `AveragingOptimizer.flush`."""
        self.optimizer.flush()

    def stats(self) -> dict[str, float]:
        """As `AveragingOptimizer.stats`."""
        found: dict[str, float] = self.optimizer.stats()
        return found


@final
class _Checkpoint:
    """What hooks of `save_state` and `load_state` do for one model and its optimizers."""

    def __init__(
        self, accelerator: Accelerator, model: torch.nn.Module, optimizers: list[AveragingOptimizer]
    ) -> None:
        self._accelerator = accelerator
        # Accelerate's list has the one, or what torch.compile has made of it.
        self._model = self._inside(model)
        self._optimizers = {str(i): optimizer for i, optimizer in enumerate(optimizers)}
        self._folder: Path | None = None
        self._beside: dict[str, Any] | None = None

    def save(self, models: list[torch.nn.Module], weights: list[Any], folder: str) -> None:
        """What Accelerate is about to write of the model becomes the mean; beside it each worker's own."""
        # Of a checkpoint that was loaded just now.
        self.finish()
        with averaged(self._model, *self._optimizers.values()):
            for i, model in enumerate(models):
                if self._inside(model) is self._model:
                    # Values that share memory share it still: of those Accelerate writes one.
                    weights[i] = copy.deepcopy(model.state_dict())
        scaler = self._accelerator.scaler
        schedulers = [s.state_dict() for s in self._accelerator._schedulers]  # noqa: SLF001  # no other way
        beside = {"schedulers": schedulers, "scaler": scaler and scaler.state_dict()}
        worker_files.write(self._own(folder), self._model, self._optimizers, beside)

    def begin(self, models: list[torch.nn.Module], folder: str) -> None:
        """Accelerate is about to load models, then optimizers."""
        self._folder = self._own(folder)
        for prepared in self._prepared():
            prepared.resume_from(self)

    def load(self) -> None:
        """Accelerate has loaded the mean, and comes to the optimizers, of which the first loads all."""
        if self._folder is not None:
            self._beside = worker_files.read(self._folder, self._model, self._optimizers)
            self._folder = None

    def finish(self) -> None:
        """After all was loaded: what Accelerate takes from rank 0, and is each worker's own."""
        if self._beside is None:
            return
        schedulers = self._accelerator._schedulers  # noqa: SLF001  # no other way
        for scheduler, state in zip(schedulers, self._beside["schedulers"], strict=True):
            scheduler.load_state_dict(state)
        if self._beside["scaler"] is not None:
            self._accelerator.scaler.load_state_dict(self._beside["scaler"])
        self._beside = None

    def _own(self, folder: str) -> Path:
        """One folder for each model after the first, as Accelerate numbers them."""
        models = map(self._inside, self._accelerator._models)  # noqa: SLF001  # no other way
        index = list(models).index(self._model)
        return Path(folder) / f"distoptim_{index}" if index else Path(folder)

    def _inside(self, model: torch.nn.Module) -> torch.nn.Module:
        found: torch.nn.Module = self._accelerator.unwrap_model(model, keep_torch_compile=False)
        return found

    def _prepared(self) -> list[AveragedOptimizer]:
        mine = list(self._optimizers.values())
        found = self._accelerator._optimizers  # noqa: SLF001  # no other way
        return [p for p in found if isinstance(p, AveragedOptimizer) and p.optimizer in mine]


def prepare(accelerator: Accelerator, *args: Any) -> Any:
    """`accelerator.prepare(*args)` without DDP around models that an averaging optimizer trains.

    `save_state` then writes the workers' mean as the model, and each worker's own beside it, from which
    `load_state` goes on bit-equal, or on another number of workers from the anchor.

    Args:
        accelerator: of a distributed type that has one model per process: no DeepSpeed, FSDP, Megatron.
        args: models, optimizers (of distoptim too), loaders, schedulers. A model is on the accelerator's
            device before the optimizer is made.

    Returns: the same, prepared, in the same order; optimizers of distoptim as `AveragedOptimizer`.

    Raises:
        ValueError: another distributed type; an optimizer without its model, or whose tau follows the loss.
    """
    # By the object that was handed over; one that is prepared comes again when Trainer trains again.
    mine = {id(x): found for x in args if (found := _averaging(x)) is not None}
    if not mine:
        return type(accelerator).prepare(accelerator, *args)
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "TP", "XLA"):
        raise ValueError(
            f"accelerator of distributed type {kind}, which keeps a model over several processes: allowed "
            "are those with a whole model in each; for FSDP2 islands device_mesh= without Accelerate"
        )
    hooks.check("accelerate", {accelerator: ("_models", "_optimizers", "_schedulers", "scaler")})
    trained = {key: _model_of(x, args) for key, x in mine.items()}
    prepared = {id(m): accelerator.prepare_model(m, evaluation_mode=True) for m in trained.values()}
    for x in args:
        if id(x) in mine:
            prepared[id(x)] = accelerator.prepare_optimizer(_wrapped(x, accelerator.scaler))
    _save_and_load(
        accelerator, [x for x in args if isinstance(x, AveragingOptimizer)], trained, prepared
    )
    rest = [x for x in args if id(x) not in prepared]
    others = type(accelerator).prepare(accelerator, *rest) if rest else ()
    made = iter(others if len(rest) > 1 else (others,))
    out = tuple(prepared[id(x)] if id(x) in prepared else next(made) for x in args)
    return out if len(out) > 1 else out[0]


def _averaging(x: object) -> AveragingOptimizer | None:
    found = x.optimizer if isinstance(x, AveragedOptimizer) else x
    return found if isinstance(found, AveragingOptimizer) else None


def _wrapped(x: Any, scaler: Any) -> AveragedOptimizer:
    if isinstance(x, AveragedOptimizer):
        return x
    loop.check(x)
    x.engine.watch.check()
    return AveragedOptimizer(x, scaler)


def _save_and_load(
    accelerator: Accelerator,
    optimizers: list[AveragingOptimizer],
    trained: dict[int, torch.nn.Module],
    prepared: dict[int, Any],
) -> None:
    """Have `save_state` and `load_state` do right by optimizers that are new, model by model."""
    for model in {id(trained[id(x)]): trained[id(x)] for x in optimizers}.values():
        mine = [x for x in optimizers if trained[id(x)] is model]
        checkpoint = _Checkpoint(accelerator, prepared[id(model)], mine)
        accelerator.register_save_state_pre_hook(checkpoint.save)
        accelerator.register_load_state_pre_hook(checkpoint.begin)


def _model_of(optimizer: AveragingOptimizer, args: tuple[Any, ...]) -> torch.nn.Module:
    """The one among the arguments that it trains."""
    own = {id(p) for sync in optimizer.engine.syncs for p in sync.fragment.params}
    for model in args:
        if isinstance(model, torch.nn.Module) and own & {id(p) for p in model.parameters()}:
            return model
    raise ValueError(
        f"prepare(): {type(optimizer).__name__} without the model that it trains; allowed are both in one "
        "call"
    )
