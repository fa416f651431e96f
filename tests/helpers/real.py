"""A training script of one of several real workers, whose gradients are its rank."""

from __future__ import annotations

import torch


def parameters(value, *shapes):
    return [torch.nn.Parameter(torch.full(shape, float(value))) for shape in shapes or [(3,)]]


def train(optimizer, params, steps, rank):
    """Constant gradients, other ones on every worker."""
    for _ in range(steps):
        for p in params:
            p.grad = torch.full_like(p, float(rank))
        optimizer.step()
        optimizer.average()
