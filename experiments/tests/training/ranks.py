"""Ranks of a run in the processes of a test."""

from __future__ import annotations

import torch
from distoptim_experiments.training.loop import Run
from distoptim_experiments.training.problem import Problem
from distoptim_experiments.training.processes import Processes
from distoptim_experiments.training.signals import StopSignals
from distoptim_experiments.training.world import World

from distoptim.engine.identity import SIZE

# What a message carries behind the parameters: its identity and its worker's weight.
TAIL = SIZE + 1
# Times, and what is summed over them.
_TIMED = ("/seconds", "/exposed_s", "/overhead_s", "/hidden_s", "/checksum")


def made(config, folder, world, *, resume=False, told=0):
    """This rank's part of a run, already told the signal `told`, if any."""
    signals = StopSignals()
    signals.received = told
    return Run(Processes(Problem(config), world, signals), folder, resume=resume)


def train(config, folder, world=None, *, resume=False, told=0):
    """Run to the end, or until the signal `told`; returns what it stopped for."""
    run = made(config, folder, world or World(config.island_size), resume=resume, told=told)
    signum = run.train()
    run.close()
    return signum


def flatten(value, name=""):
    if isinstance(value, dict):
        return {k: v for key in value for k, v in flatten(value[key], f"{name}/{key}").items()}
    if isinstance(value, list):
        return {
            k: v for i, item in enumerate(value) for k, v in flatten(item, f"{name}/{i}").items()
        }
    return {name: value}


def differing(whole, parts):
    """The entries of two checkpoints that differ, but for times."""
    whole = flatten(whole)
    parts = flatten(parts)
    return sorted(
        key
        for key in whole.keys() | parts.keys()
        if not key.endswith(_TIMED) and not _same(key, whole.get(key), parts.get(key))
    )


def _same(key, a, b):
    if not isinstance(a, torch.Tensor):
        return a == b
    if key.endswith("/pending/mean"):
        # Its identity has been looked at; the number of the message in it counts evaluations too.
        return torch.equal(a[:-TAIL], b[:-TAIL]) and torch.equal(a[-1], b[-1])
    return torch.equal(a, b)
