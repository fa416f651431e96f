"""PowerSGD as a baseline: DistributedDataParallel whose gradients travel as low-rank factors."""

import contextlib
from dataclasses import replace
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from distoptim_experiments.config import DTYPES, RunConfig
from distoptim_experiments.training.methods.base import Costs, Method, batch_loss
from distoptim_experiments.training.methods.ddp import Synchronous

# The fewest that torch's hook can do with.
FULL_STEPS = 2
# More than any model has, and few enough for DDP to count in bytes.
ONE_BUCKET_MB = 2**40
REMEMBERED = ("iter", "error_dict", "p_memory_dict", "q_memory_dict")


@final
class PowerSGD(Method):
    """Synchronous SGD with torch's PowerSGD hook: error feedback, warm start, FULL_STEPS steps
    without compression.

    A gradient matrix M (n x m) is sent as P = M Q and Q = M' P of `approximation_rank` columns,
    what a matrix of that rank misses is added to the next gradient; vectors, and matrices that
    would not become half as large, are sent whole. Exposed communication includes compression,
    since both happen while the worker waits.

    All gradients are one message (one of DDP's buckets), since torch's hook mixes the messages of
    several up on gloo: it launches the second from threads whose order differs between the workers.

    Source: Vogels et al., "PowerSGD", arXiv:1905.13727, algorithms 1 and 2.

    Args:
        model: what is trained in place.
        config: the run.
    """

    def __init__(self, model: nn.Module, config: RunConfig) -> None:
        self._model = model
        self._dtype = DTYPES[config.dtype]
        self._synchronous = Synchronous(model, config, bucket_cap_mb=ONE_BUCKET_MB)
        self.optimizer = self._synchronous.optimizer
        self._sent_bytes = 0
        self._arranged = False
        self._state = PowerSGDState(
            None,
            matrix_approximation_rank=int(config.options.get("approximation_rank", 1)),
            start_powerSGD_iter=FULL_STEPS,
            random_seed=config.seed,
        )
        self._synchronous.module.register_comm_hook(self._state, self._send)

    def step(self, images: Tensor, labels: Tensor) -> float:
        """As synchronous SGD; the first step of a process is preceded by a backward pass that only
        arranges the bucket.

        DDP puts gradients into the order in which the first pass made them. Where a resumed process
        did that a step later than the one before, what is remembered would not fit, and sums would
        be rounded differently.
        """
        if not self._arranged:
            # In evaluation mode, so that batch norm's statistics do not see the batch twice.
            self._model.eval()
            batch_loss(self._synchronous.module, images, labels, self._dtype).backward()
            self.optimizer.zero_grad()
            self._model.train()
            self._arranged = True
        return self._synchronous.step(images, labels)

    # DDP wants these very names and types, not as text: hence no `annotations` from __future__
    # here.
    def _send(self, state: PowerSGDState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]  # it exists
        """The hook, and a count of what it sends."""
        gradient = bucket.buffer()
        if not self._arranged:
            unsent: torch.futures.Future[Tensor] = torch.futures.Future()
            unsent.set_result(gradient)
            return unsent
        whole = state.iter < FULL_STEPS
        before = state.total_numel_after_compression
        if not (bucket.index() == 0 and bucket.is_last()):
            raise RuntimeError(
                "powersgd: DDP made several buckets of the gradients, where one is wanted"
            )
        future = powerSGD_hook(state, bucket)
        sent = gradient.numel() if whole else state.total_numel_after_compression - before
        self._sent_bytes += sent * gradient.element_size()
        return future

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Nothing to average: workers hold equal parameters."""
        return self._synchronous.averaged()

    def costs(self) -> Costs:
        """Bytes are what the hook handed to all-reduce."""
        return replace(self._synchronous.costs(), bytes=self._sent_bytes)

    def state_dict(self) -> dict[str, Any]:
        """What the hook remembers: errors, P and Q by bucket, and how many steps were made."""
        return {name: getattr(self._state, name) for name in REMEMBERED}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        for name in REMEMBERED:
            setattr(self._state, name, state_dict[name])
