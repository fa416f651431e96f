"""Synchronous SGD by DistributedDataParallel, the baseline of all."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Iterator
from typing import Any, final

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distoptim_experiments import optimizers
from distoptim_experiments.config import DTYPES, RunConfig
from distoptim_experiments.training.methods.base import Costs, Method, batch_loss

# torch 2.13 renamed the argument.
_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False
}


@final
class Synchronous(Method):
    """DistributedDataParallel with the run's local optimizer.

    Exposed communication is the time from the moment this worker's last gradient is computed, which
    a hook on every parameter notes, to the end of `backward()`: there DDP waits for what its
    buckets have not hidden. What they have hidden, and what DDP itself works, is not measured. The
    forward pass does not communicate: batch-norm statistics stay local, as with the other methods,
    and are averaged for evaluation.

    Args:
        model: what is trained in place.
        config: the run.
        ddp_options: of DistributedDataParallel, beside those.

    Attributes:
        module: the DistributedDataParallel around the model.
    """

    def __init__(self, model: nn.Module, config: RunConfig, **ddp_options: Any) -> None:
        self.optimizer = optimizers.build(config, model.parameters())
        self.module = DistributedDataParallel(model, **NO_BUFFER_SYNC, **ddp_options)
        self._model = model
        self._dtype = DTYPES[config.dtype]
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
        loss = batch_loss(self.module, images, labels, self._dtype)
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
        sent = self._syncs * sum(p.numel() * p.element_size() for p in self._params)
        return Costs(self._exposed_s, None, None, sent, self._syncs)
