"""The algorithms of `distoptim`."""

from __future__ import annotations

import contextlib
from typing import Any, final

import torch.distributed as dist
from torch import Tensor, nn

from distoptim.comm import Communicator
from distoptim.optimizer import AveragingOptimizer
from distoptim_experiments import optimizers
from distoptim_experiments.config import DTYPES, RunConfig
from distoptim_experiments.training import rounds
from distoptim_experiments.training.methods.base import Costs, Method, batch_loss


@final
class Averaging(Method):
    """An algorithm of `distoptim`, which measures its costs itself.

    Args:
        model: what is trained in place.
        config: the run.
        module: what the forward pass goes through, where it is another one around `model`.
        group: with whom to average; None means all.
        communicator: where workers come and go.
    """

    def __init__(
        self,
        model: nn.Module,
        config: RunConfig,
        *,
        module: nn.Module | None = None,
        group: dist.ProcessGroup | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        where: dict[str, Any] = {"communicator": communicator, "module": model}
        if communicator is None:
            where = {"group": group, "levels": rounds.groups(config)}
        optimizer = optimizers.build(config, model.parameters(), **where)
        assert isinstance(optimizer, AveragingOptimizer)
        self.optimizer: AveragingOptimizer = optimizer
        self._model = model
        self._module = module or model
        self._dtype = DTYPES[config.dtype]

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Forward, backward, local step, average."""
        loss = batch_loss(self._module, images, labels, self._dtype)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.optimizer.average(loss=loss)
        return float(loss.item())

    @property
    def rounds(self) -> int:
        """From the optimizer's own counters."""
        return self.optimizer.rounds

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Mean parameters and batch-norm statistics."""
        return self.optimizer.averaged(self._model)

    def costs(self) -> Costs:
        """From the optimizer's own counters."""
        stats = self.optimizer.stats()
        return Costs(
            stats["exposed_s"],
            stats["overhead_s"],
            stats["hidden_s"],
            int(stats["bytes"]),
            int(stats["syncs"]),
        )

    def stats(self) -> dict[str, float]:
        """From the optimizer's own counters."""
        stats = self.optimizer.stats()
        return {name: stats[name] for name in ("tau", "staleness", "quarantined")}

    def close(self) -> None:
        """Close the optimizer."""
        self.optimizer.close()
