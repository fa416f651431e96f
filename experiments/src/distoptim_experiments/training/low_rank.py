"""PowerSGD between virtual workers, which have no DDP whose hook could do that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from distoptim_experiments.training.methods.powersgd import FULL_STEPS


@final
class LowRankMean:
    """The mean of gradients, which travel as low-rank factors.

    A matrix M_i (n x m) with worker i's error added: P = mean of M_i Q, made orthonormal; Q = mean of
    M_i' P; everybody takes P Q', and M_i - P Q' is its next error. What is sent whole, and for how many steps
    all is, is as in torch's hook.

    Source: Vogels et al., "PowerSGD", arXiv:1905.13727, algorithms 1 and 2.

    Args:
        rank: columns of P and Q, >= 1.
        seed: of the first Q.

    Attributes:
        nbytes: of what each worker has handed over.
    """

    def __init__(self, *, rank: int, seed: int) -> None:
        self.nbytes = 0
        self._rank = rank
        self._random = torch.Generator().manual_seed(seed)
        self._steps = 0
        self._q: dict[str, Tensor] = {}
        self._errors: dict[str, list[Tensor]] = {}

    def __call__(self, gradients: Sequence[Sequence[Tensor]]) -> None:
        """Put the mean in place of them: of each parameter those of all workers."""
        whole = self._steps < FULL_STEPS
        for i, workers in enumerate(gradients):
            if whole or not self._pays(workers[0]):
                mean = torch.stack(list(workers)).mean(0)
                self.nbytes += mean.nbytes
            else:
                mean = self._mean(str(i), [g.flatten(1) for g in workers]).view_as(workers[0])
            for gradient in workers:
                gradient.copy_(mean)
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        """All that it remembers, as tensors and plain data."""
        return {
            "nbytes": self.nbytes,
            "steps": self._steps,
            "q": self._q,
            "errors": self._errors,
            "random": self._random.get_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.nbytes = state_dict["nbytes"]
        self._steps = state_dict["steps"]
        self._q = state_dict["q"]
        self._errors = state_dict["errors"]
        self._random.set_state(state_dict["random"])

    def _pays(self, gradient: Tensor) -> bool:
        """Whether factors are at most half as large."""
        if gradient.dim() < 2:
            return False
        n, m = gradient.flatten(1).shape
        return 2 * self._rank * (n + m) < n * m

    def _mean(self, name: str, matrices: list[Tensor]) -> Tensor:
        if name not in self._q:
            shape = (matrices[0].shape[1], self._rank)
            self._q[name] = torch.randn(shape, generator=self._random)
            self._errors[name] = [torch.zeros_like(m) for m in matrices]
        errors = self._errors[name]
        for error, matrix in zip(errors, matrices, strict=True):
            error.add_(matrix)
        # What is linear in M_i is the same of their mean.
        mean = torch.stack(errors).mean(0)
        p = torch.linalg.qr(mean @ torch.linalg.qr(self._q[name]).Q).Q
        q = mean.T @ p
        self._q[name] = q
        self.nbytes += p.nbytes + q.nbytes
        made: Tensor = p @ q.T
        for error in errors:
            error.sub_(made)
        return made
