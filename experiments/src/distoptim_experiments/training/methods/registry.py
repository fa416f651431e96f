"""All methods, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from distoptim_experiments.config import POWERSGD, SYNCHRONOUS, RunConfig
from distoptim_experiments.training.methods.averaging import Averaging
from distoptim_experiments.training.methods.base import Method
from distoptim_experiments.training.methods.ddp import Synchronous
from distoptim_experiments.training.methods.islands import IslandAveraging
from distoptim_experiments.training.methods.powersgd import PowerSGD

METHODS: dict[str, Callable[[nn.Module, RunConfig], Method]] = {
    SYNCHRONOUS: Synchronous,
    POWERSGD: PowerSGD,
}
"""The baselines; every other name is that of an algorithm of `distoptim`."""


def build(model: nn.Module, config: RunConfig) -> Method:
    """The method that `config` names, training `model` in place. Collective."""
    if config.algorithm in METHODS:
        return METHODS[config.algorithm](model, config)
    return IslandAveraging(model, config) if config.island_size > 1 else Averaging(model, config)
