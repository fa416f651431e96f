"""A module's statistics that travel with every mean, so that nobody need be asked for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor

from distoptim.fragments import Flat, Fragment


@final
class ModuleStatistics:
    """What all workers' statistics were at the launch of the last mean, where workers come and go.

    Args:
        tensors: this worker's, live.

    Attributes:
        numel: numbers in them.
        mean: [numel], of the last mean; None before the first.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self.numel = sum(t.numel() for t in self._tensors)
        self.mean: Tensor | None = None

    def write(self, out: Tensor) -> None:
        """out <- this worker's; where they are not finite, the last mean's.

        Args:
            out: [numel].
        """
        torch.cat([t.flatten() for t in self._tensors], out=out)
        if not bool(out.sum().isfinite()):
            out.zero_() if self.mean is None else out.copy_(self.mean)

    def means(self, fragments: Iterable[Fragment]) -> list[tuple[Fragment, Flat]]:
        """Those fragments of statistics that travel so, with their means; none before the first mean."""
        ends = [0]
        for tensor in self._tensors:
            ends.append(ends[-1] + tensor.numel())
        starts = dict(zip(map(id, self._tensors), ends, strict=False))
        found = []
        for fragment in fragments:
            if self.mean is not None and all(id(p) in starts for p in fragment.params):
                flat = fragment.flat(extra=1)
                for view, p in zip(flat.views, fragment.params, strict=True):
                    start = starts[id(p)]
                    view.copy_(self.mean[start : start + p.numel()].view_as(p))
                flat.tensor[-1] = 1.0
                found.append((fragment, flat))
        return found
