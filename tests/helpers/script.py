"""A training script of one worker, whose gradients are one number."""

from __future__ import annotations

import torch


def parameters(*shapes):
    return [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]


def set_gradients(params, value=1.0):
    for p in params:
        p.grad = torch.full_like(p, value)


def train(optimizer, params, steps):
    for _ in range(steps):
        set_gradients(params)
        optimizer.step()
        optimizer.average()
