"""The workers' mean for evaluation, beside the rounds that go on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from distoptim import module_state, spectral_norm
from distoptim.comm.mesh import WorkerMesh
from distoptim.engine.calls import Calls
from distoptim.engine.engine import Engine
from distoptim.engine.identity import Kind
from distoptim.fragments import Flat, Fragment, build, unfit
from distoptim.module_state import Parts


@contextlib.contextmanager
def averaged(optimizers: Sequence[Calls], module: torch.nn.Module | None) -> Iterator[None]:
    """Within the block the optimizers' parameters, and the module's statistics, are the workers' mean.

    Raises:
        ValueError: the module is not the one that is trained, or not in whole, or something in it
            differs between workers that is neither a statistic nor a worker's own.
    """
    engines = [calls.engine for calls in optimizers]
    with optimizers[0].telling():
        means, statistics = _means(optimizers, module)
        # Tensors made in inference mode can be written in it alone.
        mode = any(x.is_inference() for x in statistics)
        with torch.inference_mode(mode), torch.no_grad():
            local = [[x.clone() for x in fragment.local()] for fragment, _ in means]
            for fragment, mean in means:
                fragment.write(mean)
    # A block inside a block ends as one.
    before = [engine.evaluating for engine in engines]
    for engine in engines:
        engine.evaluating = True
    try:
        with spectral_norm.normalised(module):
            yield
    finally:
        for engine, evaluating in zip(engines, before, strict=True):
            engine.evaluating = evaluating
        with torch.inference_mode(mode), torch.no_grad():
            for (fragment, _), values in zip(means, local, strict=True):
                torch._foreach_copy_(fragment.local(), values)
        spectral_norm.recompute_weights(module)
        _reshard(module)


def _means(
    optimizers: Sequence[Calls], module: torch.nn.Module | None
) -> tuple[list[tuple[Fragment, Flat]], list[Tensor]]:
    """The means of parameters and statistics, and the statistics; collective."""
    engines = [calls.engine for calls in optimizers]
    parts = _parts(engines, module)
    said = _said(engines, parts)
    kind = Kind.AVERAGED_MODULE if parts.compared else Kind.AVERAGED
    # First, since it finds workers that are elsewhere.
    means = [
        (sync.fragment, mean)
        for calls in optimizers
        for sync, mean in zip(calls.engine.syncs, calls.means(kind), strict=True)
    ]
    statistics, more = _statistics(optimizers, parts, said, Kind.AVERAGED)
    return means + more, statistics


@torch.no_grad()
def consolidate(optimizers: Sequence[Calls], module: torch.nn.Module | None) -> None:
    """The optimizers' parameters, and the module's statistics, become the workers' mean for good.

    Raises:
        ValueError: as `averaged`.
    """
    engines = [calls.engine for calls in optimizers]
    with optimizers[0].telling():
        for engine in engines:
            engine.check_local()
        parts = _parts(engines, module)
        said = _said(engines, parts)
        kind = Kind.CONSOLIDATE_MODULE if parts.compared else Kind.CONSOLIDATE
        means = [calls.means(kind) for calls in optimizers]
        statistics, more = _statistics(optimizers, parts, said, Kind.CONSOLIDATE)
        for calls, own in zip(optimizers, means, strict=True):
            calls.adopt(own)
        with torch.inference_mode(any(x.is_inference() for x in statistics)):
            for fragment, mean in more:
                fragment.write(mean)
        spectral_norm.recompute_weights(module)
        _reshard(module)


@torch.no_grad()
def average_module(calls: Calls, module: torch.nn.Module) -> None:
    """A module that the optimizer does not train becomes the workers' mean, in place.

    Raises:
        ValueError: the optimizer trains it, or something in it differs between workers that is neither a
            parameter nor a statistic nor a worker's own.
    """
    with calls.telling():
        parts = _copied(calls.engine, module)
        said = _said([calls.engine], parts)
        calls.meet(Kind.MODULE)
        _, means = _statistics([calls], parts, said, Kind.MODULE)
        for fragment, mean in means:
            fragment.write(mean)
        spectral_norm.recompute_weights(module)


def _copied(engine: Engine, module: torch.nn.Module) -> Parts:
    """What is in a module that the engine does not train; its parameters are averaged."""
    _refuse_elastic(engine, Kind.MODULE)
    _check_kind(module)
    own = {id(p) for p in _params([engine])}
    kind = type(module).__name__
    if any(id(p) in own for p in module.parameters()):
        raise ValueError(
            f"average_module({kind}): it has parameters that this optimizer trains; allowed is a copy, "
            "such as a moving average of the weights. For the module that is trained there are "
            "averaged(module) and consolidate(module)"
        )
    parts = module_state.parts_of([module], own)
    params = {n: p for n, p in module.named_parameters() if not unfit(p)}
    averaged_too = {n: t for n, t in {**parts.equal, **parts.trained}.items() if n in params}
    equal = {n: t for n, t in parts.equal.items() if n not in params}
    return Parts({**parts.statistics, **averaged_too}, equal)


def _statistics(
    optimizers: Sequence[Calls], parts: Parts, said: dict[str, str], kind: Kind
) -> tuple[list[Tensor], list[tuple[Fragment, Flat]]]:
    """What of a module is averaged beside the parameters, and its means; collective."""
    engines = [calls.engine for calls in optimizers]
    elastic = engines[0].communicator.elastic
    if not elastic:
        _compare(engines, said, kind)
    tensors = list(parts.statistics.values())
    if not tensors:
        return [], []
    fragments = build(tensors, [0] * len(tensors), [range(len(tensors))])
    if elastic:
        # Others need not be here: those that came with the last mean.
        known = [engine.statistics for engine in engines if engine.statistics is not None]
        return tensors, [pair for each in known for pair in each.means(fragments)]
    return tensors, [(fragment, optimizers[0].mean_of(fragment, kind)) for fragment in fragments]


def _check_kind(module: object) -> None:
    if not isinstance(module, torch.nn.Module):
        raise ValueError(f"{str(module)[:60]}: allowed is a torch.nn.Module")


def _refuse_elastic(engine: Engine, kind: Kind) -> None:
    if engine.communicator.elastic:
        raise ValueError(
            f"{kind.call} beside workers that come and go (Elastic): nobody else need be in it; allowed "
            "are averaged() and consolidate()"
        )


def _params(engines: Sequence[Engine]) -> list[Tensor]:
    return [p for engine in engines for sync in engine.syncs for p in sync.fragment.params]


def _parts(engines: Sequence[Engine], module: torch.nn.Module | None) -> Parts:
    """What is in the module beside the engines' parameters; whether it is theirs in whole, as it was."""
    for engine in engines:
        engine.watch.check()
    if module is None:
        return Parts()
    _check_kind(module)
    _reshard(module)
    own = {id(p) for p in _params(engines)}
    theirs = list(module.parameters())
    if theirs and not any(id(p) in own for p in theirs):
        kind = type(module).__name__
        raise ValueError(
            f"averaged({kind}): none of its parameters is this optimizer's; allowed is the module that "
            "is trained. To bring a copy up to date, do it inside the block: with "
            "optimizer.averaged(model): copy.load_state_dict(model.state_dict()), or "
            "average.update_parameters(model)"
        )
    parts = module_state.parts_of([module], own)
    for name in parts.trained:
        raise ValueError(
            f"averaged({type(module).__name__}): {name!r} is trained and is not this optimizer's, so it "
            "would stay local; average what several optimizers train with "
            "distoptim.averaged(model, first, second), or declare "
            f"distoptim.local(model, {name!r})"
        )
    return parts


def _said(engines: Sequence[Engine], parts: Parts) -> dict[str, str]:
    """What workers compare of a module, by name; made before the first message, since it may be refused."""
    communicator = engines[0].communicator
    if communicator.size == 1 or communicator.elastic:
        return {}
    said = {name: module_state.look(t) for name, t in parts.statistics.items()}
    return said | {name: module_state.digest(t) for name, t in parts.equal.items()}


def _compare(engines: Sequence[Engine], own: dict[str, str], kind: Kind) -> None:
    """Whether what is to be equal is, and statistics have equal shapes; collective."""
    if not own:
        return
    communicator = engines[0].communicator
    call = kind.call
    # Ranks that are one worker find the same difference, or one would go on alone.
    with engines[0].reducer.guard():
        ranks = WorkerMesh(_params(engines)).all_gather_json(own, what=call)
        everybody = communicator.all_gather_json(ranks, what=call)
    found = module_state.differences(cast("list[list[dict[str, str]]]", everybody))
    for name, worker in found.items():
        rank = communicator.ranks[worker]
        raise ValueError(
            f"{call}: {name!r} differs between rank {communicator.ranks[0]} and rank {rank}, and is neither a statistic "
            "nor a worker's own. Make it equal at the start with module=model in the optimizer's "
            f"constructor, or say what it is: distoptim.statistics(model, {name!r}) to average it, "
            f"distoptim.local(model, {name!r}) to leave it alone"
        )


def _reshard(module: torch.nn.Module | None) -> None:
    """Make FSDP gather parameters anew.

    After a forward pass without a backward one the root keeps the old ones.
    """
    for part in module.modules() if module is not None else ():
        if hasattr(part, "set_reshard_after_forward"):
            part.reshard()  # type: ignore[operator]  # an FSDPModule's method


@torch.no_grad()
def consensus_distance(calls: Calls) -> float:
    """Root mean square over the workers of |x_i - mean x|.

    x is this rank's shard where parameters are DTensors.
    """
    engine = calls.engine
    _refuse_elastic(engine, Kind.CONSENSUS)
    square = 0.0
    means = calls.means(Kind.CONSENSUS)
    for fragment, mean in zip([sync.fragment for sync in engine.syncs], means, strict=True):
        mine = fragment.flat()
        fragment.read(mine)
        own = slice(fragment.params_numel)
        square += float(torch.dist(mine.tensor[own], mean.tensor[own])) ** 2
    with engine.reducer.guard():
        squares = engine.communicator.all_gather_json(square, what=Kind.CONSENSUS.call)
    return float(torch.tensor(squares).mean().sqrt())
