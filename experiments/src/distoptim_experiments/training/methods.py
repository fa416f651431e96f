"""One step of training, with its clock.

An averaging algorithm, or synchronous SGD by DistributedDataParallel.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distoptim.optimizer import AveragingOptimizer
from distoptim_experiments import optimizers
from distoptim_experiments.config import DTYPES, POWERSGD, SYNCHRONOUS, RunConfig
from distoptim_experiments.data.datasets import Dataset
from distoptim_experiments.training import rounds

# torch 2.13 renamed the argument.
_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False
}


@dataclass(frozen=True)
class Costs:
    """What communication has cost this worker; see `records.Summary`."""

    exposed_s: float = 0.0
    overhead_s: float | None = 0.0
    hidden_s: float | None = 0.0
    bytes: int = 0
    syncs: int = 0

    def __add__(self, other: Costs) -> Costs:
        """Both together; what one of them did not measure is unknown."""
        return Costs(
            self.exposed_s + other.exposed_s,
            _sum(self.overhead_s, other.overhead_s),
            _sum(self.hidden_s, other.hidden_s),
            self.bytes + other.bytes,
            self.syncs + other.syncs,
        )


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


class Method(ABC):
    """What the training loop asks for."""

    optimizer: torch.optim.Optimizer

    @abstractmethod
    def step(self, images: Tensor, labels: Tensor) -> float:
        """Train on one batch; returns its loss."""

    @abstractmethod
    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within it the model is the workers' mean; entering is collective."""

    @abstractmethod
    def costs(self) -> Costs:
        """What communication has cost this worker since this object was made."""

    def stats(self) -> dict[str, float]:
        """What it tells of its rounds, where it has some: tau, staleness, quarantined."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What this worker needs to go on, besides model and optimizer."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027  # most have nothing
        """Go on from `state_dict()` of the same worker."""

    def close(self) -> None:  # noqa: B027  # not all have something to leave
        """Leave the communication groups of its own."""


class Averaging(Method):
    """An algorithm of `distoptim`, which measures its costs itself.

    Args:
        model: what is trained in place.
        config: the run.
        module: what the forward pass goes through, where it is another one around `model`.
        group: with whom to average; None means all.
    """

    def __init__(
        self,
        model: nn.Module,
        config: RunConfig,
        *,
        module: nn.Module | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        optimizer = optimizers.build(
            config, model.parameters(), group=group, levels=rounds.groups(config)
        )
        assert isinstance(optimizer, AveragingOptimizer)
        self.optimizer = self._averaging = optimizer
        self._model, self._module, self._dtype = model, module or model, DTYPES[config.dtype]

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Forward, backward, local step, average."""
        loss = batch_loss(self._module, images, labels, self._dtype)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._averaging.average(loss=loss)
        return float(loss.item())

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Mean parameters and batch-norm statistics."""
        return self._averaging.averaged(self._model)

    def costs(self) -> Costs:
        """From the optimizer's own counters."""
        stats = self._averaging.stats()
        return Costs(
            stats["exposed_s"],
            stats["overhead_s"],
            stats["hidden_s"],
            int(stats["bytes"]),
            int(stats["syncs"]),
        )

    def stats(self) -> dict[str, float]:
        """From the optimizer's own counters."""
        stats = self._averaging.stats()
        return {name: stats[name] for name in ("tau", "staleness", "quarantined")}

    def close(self) -> None:
        """Close the optimizer."""
        self._averaging.close()


class Synchronous(Method):
    """DistributedDataParallel with SGD.

    Exposed communication is the time from the moment this worker's last gradient is computed, which
    a hook on every parameter notes, to the end of `backward()`: there DDP waits for what its
    buckets have not hidden. What they have hidden, and what DDP itself works, is not measured. The
    forward pass does not communicate: batch-norm statistics stay local, as with the other methods,
    and are averaged for evaluation.
    """

    def __init__(self, model: nn.Module, config: RunConfig, **ddp_options: Any) -> None:
        self.optimizer = optimizers.build(config, model.parameters())
        self._model, self._dtype = model, DTYPES[config.dtype]
        self._ddp = DistributedDataParallel(model, **NO_BUFFER_SYNC, **ddp_options)
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._last_gradient = 0.0
        for p in self._params:
            p.register_hook(self._note)  # type: ignore[no-untyped-call]  # torch has no types for it
        self._exposed_s = 0.0
        self._syncs = 0

    def _note(self, gradient: Tensor) -> None:
        self._last_gradient = time.perf_counter()

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Forward, backward with the gradients' mean, step."""
        loss = batch_loss(self._ddp, images, labels, self._dtype)
        loss.backward()
        self._exposed_s += time.perf_counter() - self._last_gradient
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._syncs += 1
        return float(loss.item())

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Parameters are equal everywhere; batch-norm statistics are averaged, and put back."""
        buffers = [b for b in self._model.buffers() if b.is_floating_point()]
        local = [b.clone() for b in buffers]
        for b in buffers:
            dist.all_reduce(b)
            b.div_(dist.get_world_size())
        try:
            yield
        finally:
            for b, value in zip(buffers, local, strict=True):
                b.copy_(value)

    def costs(self) -> Costs:
        """A gradient for every parameter at every step."""
        return Costs(self._exposed_s, None, None, self._bytes(), self._syncs)

    def _bytes(self) -> int:
        return self._syncs * sum(p.numel() * p.element_size() for p in self._params)


def build(model: nn.Module, config: RunConfig) -> Method:
    """The method that `config` names, training `model` in place. Collective."""
    if config.algorithm == POWERSGD:
        # These derive from what is defined here.
        from distoptim_experiments.training.powersgd import PowerSGD

        return PowerSGD(model, config)
    if config.island_size > 1:
        from distoptim_experiments.training.islands import IslandAveraging

        return IslandAveraging(model, config)
    return (
        Synchronous(model, config) if config.algorithm == SYNCHRONOUS else Averaging(model, config)
    )


def score(model: nn.Module, data: Dataset) -> dict[str, float]:
    """`evaluate` on the test set, and on the validation set if there is one."""
    found = evaluate(model, data.test_images, data.test_labels)
    return (
        {**found, **evaluate(model, *data.validation, part="validation")}
        if data.validation
        else found
    )


def goes_on(losses: Iterable[float]) -> bool:
    """Whether a run can go on after the workers' losses of a step: one that is finite is enough,
    since a worker that has gone astray alone is left out of the next mean and brought back by it.
    """
    return any(map(math.isfinite, losses))


def mean_loss(losses: Sequence[float]) -> float:
    """Of those that are finite; NaN if there are none."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else math.nan


def diverged(found: Mapping[str, float], classes: int, *, whole: bool) -> bool:
    """Whether a run ended early (not `whole`), or with a `score` no better than guessing."""
    return not whole or not found["test_loss"] < math.log(classes)


def worker_accuracy(model: nn.Module, data: Dataset) -> float:
    """Of a single worker's own model, on the first 1000 test images or 100 windows of text.

    All workers are asked.
    """
    few = 1000 if data.test_labels.dim() == 1 else 100
    return evaluate(model, data.test_images[:few], data.test_labels[:few])["test_accuracy"]


def evaluate(
    model: nn.Module, images: Tensor, labels: Tensor, *, part: str = "test", batch_size: int = 512
) -> dict[str, float]:
    """Mean loss (nats) and accuracy (in [0, 1]) per label of `model` in evaluation mode.

    Its mode is put back.
    """
    was_training = model.training
    model.eval()
    loss, right = 0.0, 0
    with torch.no_grad():
        for x, y in zip(
            torch.split(images, batch_size), torch.split(labels, batch_size), strict=True
        ):
            out = model(x)
            loss += float(nn.functional.cross_entropy(out, y, reduction="sum"))
            right += int((out.argmax(1) == y).sum())
    model.train(was_training)
    return {f"{part}_loss": loss / labels.numel(), f"{part}_accuracy": right / labels.numel()}


def batch_loss(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Any:
    """Cross-entropy of a batch, under autocast if `dtype` is bfloat16."""
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        return nn.functional.cross_entropy(model(images), labels)
