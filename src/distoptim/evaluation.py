"""The workers' mean for evaluation, beside the rounds that go on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from distoptim.engine import Engine
from distoptim.fragments import build


@contextlib.contextmanager
def averaged(engine: Engine, module: torch.nn.Module | None) -> Iterator[None]:
    """Within the block the engine's parameters, and the module's floating-point buffers, are the workers' mean."""
    buffers = [b for b in (module.buffers() if module is not None else ()) if b.is_floating_point()]
    fragments = [slot.fragment for slot in engine.slots]
    if buffers:
        fragments += build(buffers, [0] * len(buffers), [range(len(buffers))], 1)
    means = [engine.mean_of(f) for f in fragments]
    tensors = [x for f in fragments for x in f.params]
    with torch.no_grad():
        local = [x.detach().clone() for x in tensors]
        for f, mean in zip(fragments, means, strict=True):
            f.write(mean)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(tensors, local)


@torch.no_grad()
def consensus_distance(engine: Engine) -> float:
    """Root mean square over the workers of |x_i - mean x|."""
    square = 0.0
    for fragment in (slot.fragment for slot in engine.slots):
        mean, mine = engine.mean_of(fragment), fragment.flat()
        fragment.read(mine)
        square += float(torch.dist(mine.tensor, mean.tensor[: fragment.numel])) ** 2
    return float(torch.tensor(engine.communicator.exchange(square)).mean().sqrt())
