"""PowerSGD as a baseline: DistributedDataParallel whose gradients travel as low-rank factors."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from distoptim.train.config import RunConfig
from distoptim.train.methods import Synchronous

# The fewest that torch's hook can do with: DDP arranges its buckets anew after the first step.
FULL_STEPS = 2


class PowerSGD(Synchronous):
    """Synchronous SGD with torch's PowerSGD hook: error feedback, warm start, FULL_STEPS steps without compression.

    A gradient matrix M (n x m) is sent as P = M Q and Q = M' P of `approximation_rank` columns, what a matrix of that
    rank misses is added to the next gradient; vectors, and matrices that would not become half as large, are sent
    whole. Exposed communication includes compression, since both happen while the worker waits. A resumed run begins
    with no errors remembered and FULL_STEPS full steps.

    Source: Vogels et al., "PowerSGD", arXiv:1905.13727, algorithms 1 and 2.
    """

    def __init__(self, model: nn.Module, config: RunConfig) -> None:
        super().__init__(model, config)
        self._bytes = 0
        self._state = PowerSGDState(
            None, matrix_approximation_rank=int(config.options.get("approximation_rank", 1)),
            start_powerSGD_iter=FULL_STEPS, random_seed=config.seed)
        self._ddp.register_comm_hook(self._state, self._send)

    # DDP wants these very names and types, not as text: hence no `annotations` from __future__ here.
    def _send(self, state: PowerSGDState,
              bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]  # it exists
        """The hook, and a count of what it sends."""
        gradient = bucket.buffer()
        whole, before = state.iter < FULL_STEPS, state.total_numel_after_compression
        future = powerSGD_hook(state, bucket)
        sent = gradient.numel() if whole else state.total_numel_after_compression - before
        self._bytes += sent * gradient.element_size()
        return future

    def traffic(self) -> dict[str, int]:
        """What the hook handed to all-reduce."""
        return {**super().traffic(), "bytes": self._bytes}
