"""The workers' mean for evaluation, beside the rounds that go on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from distoptim.engine.engine import Engine
from distoptim.engine.identity import Kind
from distoptim.fragments import build


@contextlib.contextmanager
def averaged(engine: Engine, module: torch.nn.Module | None) -> Iterator[None]:
    """Within the block the engine's parameters are the workers' mean.

    The module's floating-point buffers are too.

    Raises:
        ValueError: the module has parameters to train and none of the engine's.
    """
    _reshard(module)
    _check(engine, module)
    buffers = [b for b in (module.buffers() if module is not None else ()) if b.is_floating_point()]
    fragments = [sync.fragment for sync in engine.syncs]
    means = engine.means(Kind.AVERAGED)
    for fragment in build(buffers, [0] * len(buffers), [range(len(buffers))]) if buffers else ():
        fragments.append(fragment)
        means.append(engine.mean_of(fragment, Kind.AVERAGED))
    with torch.no_grad():
        local = [[x.clone() for x in f.local()] for f in fragments]
        for f, mean in zip(fragments, means, strict=True):
            f.write(mean)
    # A block inside a block ends as one.
    before = engine.evaluating
    engine.evaluating = True
    try:
        yield
    finally:
        engine.evaluating = before
        with torch.no_grad():
            for f, values in zip(fragments, local, strict=True):
                torch._foreach_copy_(f.local(), values)
            _reshard(module)


def _check(engine: Engine, module: torch.nn.Module | None) -> None:
    """Whether the module is the one that is trained."""
    if module is None:
        return
    mine = {id(p) for sync in engine.syncs for p in sync.fragment.params}
    theirs = {id(p) for p in module.parameters() if p.requires_grad}
    if theirs and not theirs & mine:
        raise ValueError(
            f"averaged({type(module).__name__}): none of its parameters is this optimizer's; allowed "
            "is the module that is trained"
        )


def _reshard(module: torch.nn.Module | None) -> None:
    """Make FSDP gather parameters anew.

    After a forward pass without a backward one the root keeps the old ones.
    """
    for part in module.modules() if module is not None else ():
        if hasattr(part, "set_reshard_after_forward"):
            part.reshard()  # type: ignore[operator]  # an FSDPModule's method


@torch.no_grad()
def consensus_distance(engine: Engine) -> float:
    """Root mean square over the workers of |x_i - mean x|.

    x is this rank's shard where parameters are DTensors.
    """
    square = 0.0
    means = engine.means(Kind.CONSENSUS)
    for fragment, mean in zip([sync.fragment for sync in engine.syncs], means, strict=True):
        mine = fragment.flat()
        fragment.read(mine)
        square += float(torch.dist(mine.tensor, mean.tensor[: fragment.numel])) ** 2
    squares = engine.communicator.all_gather_json(square, what="consensus_distance()")
    return float(torch.tensor(squares).mean().sqrt())
