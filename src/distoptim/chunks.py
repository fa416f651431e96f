"""Elementwise work on one chunk of a tensor after another: a chain of it passes over memory once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Numbers that a thread works on at a time: few enough for a core's caches, many enough that calling
# torch costs little.
CHUNK = 2**18


def chunked(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, cut alike along their slowest dimension.

    They come whole where they are small or not on the CPU. Numbers are the same in chunks as in one,
    but for sums, which must not depend on the cut (it follows the number of threads).
    """
    first = tensors[0]
    size = CHUNK * torch.get_num_threads()
    if first.device.type != "cpu" or first.numel() <= size:
        return iter([tensors])
    dim = max((d for d in range(first.dim()) if first.shape[d] > 1), key=first.stride)
    rows = max(1, size * first.shape[dim] // first.numel())
    return zip(*(torch.split(t, rows, dim) for t in tensors), strict=True)
