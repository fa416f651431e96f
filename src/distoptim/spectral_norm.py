"""Spectral norms: a worker's vectors belong to its own parameters, and weights are made of both."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

# As many as torch makes when a spectral norm is made.
_POWER_ITERATIONS = 15


def is_vector(owner: torch.nn.Module, leaf: str) -> bool:
    """Whether a buffer of the owner's is one of a spectral norm's vectors."""
    if isinstance(owner, _SpectralNorm) and leaf in ("_u", "_v"):
        return True
    return any(leaf in (f"{hook.name}_u", f"{hook.name}_v") for hook in _hooks(owner))


def _hooks(owner: torch.nn.Module) -> list[SpectralNorm]:
    """Of torch.nn.utils.spectral_norm; that of parametrizations is a module."""
    hooks = owner._forward_pre_hooks.values()  # noqa: SLF001  # torch finds them so too
    return [hook for hook in hooks if isinstance(hook, SpectralNorm)]


def _norms(
    module: torch.nn.Module,
) -> Iterator[tuple[list[Tensor], Callable[[bool], None]]]:
    """(its vectors, what computes the weight anew, with a power iteration or without) of each."""
    for owner in module.modules():
        for hook in _hooks(owner):
            vectors = [getattr(owner, f"{hook.name}_{x}") for x in "uv"]
            yield vectors, partial(_recompute, owner, hook)
        for name, chain in getattr(owner, "parametrizations", {}).items():
            for norm in chain:
                if isinstance(norm, _SpectralNorm):
                    yield list(norm.buffers()), partial(_reparametrise, owner, name, norm)


def _recompute(owner: torch.nn.Module, hook: SpectralNorm, iterate: bool) -> None:
    setattr(owner, hook.name, hook.compute_weight(owner, do_power_iteration=iterate))


def _reparametrise(owner: torch.nn.Module, name: str, norm: _SpectralNorm, iterate: bool) -> None:
    """In training mode, reading the weight makes a power iteration; without one nothing is kept."""
    if not iterate:
        return
    training = norm.training
    norm.training = True
    try:
        getattr(owner, name)
    finally:
        norm.training = training


@contextlib.contextmanager
def normalised(module: torch.nn.Module | None) -> Iterator[None]:
    """Within the block spectral norms are those of the parameters as they are now.

    A worker's vectors belong to its own parameters: with others their quotient would have another norm
    than 1. They are put back.
    """
    norms: list[Any] = [] if module is None else list(_norms(module))
    with torch.no_grad():
        saved = [[v.clone() for v in vectors] for vectors, _ in norms]
        for (_, recompute), _ in itertools.product(norms, range(_POWER_ITERATIONS)):
            recompute(True)
    try:
        yield
    finally:
        with torch.no_grad():
            for (vectors, _), values in zip(norms, saved, strict=True):
                torch._foreach_copy_(vectors, values)


def recompute_weights(module: torch.nn.Module | None) -> None:
    """Make the weights that hooks of spectral norm have left anew, from parameters and vectors."""
    with torch.no_grad():
        for _, recompute in () if module is None else _norms(module):
            recompute(False)
