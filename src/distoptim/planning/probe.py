"""Time the real step and the real link, for the planner.

Run it under torchrun, one process per worker.
"""

from __future__ import annotations

import importlib
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from distoptim import checks
from distoptim.comm import measured, world_size


@dataclass(frozen=True)
class Measured:
    """What a probe found.

    Attributes:
        step_s: median seconds of a local step, of the slowest worker.
        params: number of trainable parameters, 0 if the function did not say.
        workers: how many took part.
        latency_s: seconds one message takes, in the ring's formula.
        bandwidth_gbit_s: each worker's rate, in Gbit/s.
    """

    step_s: float
    params: int
    workers: int
    latency_s: float
    bandwidth_gbit_s: float

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it, for the file that `plan --probe` reads."""
        return asdict(self)


def load(target: str) -> Callable[[], Any]:
    """The function that "module:function" names.

    Raises:
        ValueError: it is not of that form, or there is no such function.
    """
    module, _, name = target.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{target!r}: {error}; wanted is module:function") from error
    if not callable(function):
        raise ValueError(f"{target!r} is not a function")
    return function  # type: ignore[no-any-return]  # callable, as just checked


def probe_under_torchrun(target: str, *, steps: int, backend: str | None = None) -> Measured | None:
    """Join the other workers and `probe` the function that "module:function" names.

    Returns what was found on rank 0, None on the others.

    Args:
        target: see `load`.
        steps: timed.
        backend: of torch.distributed; default nccl with a GPU, else gloo.

    Raises:
        ValueError: torchrun has not started this process, it started only one, or there is no such
            function.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        raise ValueError(
            "start it with torchrun: torchrun --nproc-per-node=... -m distoptim probe ..."
        )
    prepare = load(target)
    with measured.joined(backend) as rank:
        found = probe(prepare, steps=steps)
    return found if rank == 0 else None


def probe(prepare: Callable[[], Any], *, steps: int = 20, repeats: int = 5) -> Measured:
    """Time local steps and all-reduces on all workers; collective.

    Args:
        prepare: called once; returns a step (a function without arguments that trains for one local
            step without communication), or a pair of the model and such a step.
        steps: timed, after a fifth as many for warming up.
        repeats: of each all-reduce; the median counts.

    Raises:
        ValueError: a value outside its range, or workers disagree on model, steps or repeats.
    """
    checks.integer("steps", steps, 1)
    checks.integer("repeats", repeats, 1)
    prepared = prepare()
    model, step = prepared if isinstance(prepared, tuple) else (None, prepared)
    params = (
        sum(p.numel() for p in model.parameters() if p.requires_grad) if model is not None else 0
    )
    device = next(model.parameters()).device if model is not None else torch.device("cpu")
    measured.agree({"parameters": params, "steps": steps, "repeats": repeats}, device)
    step_s = measured.slowest(_step_s(step, steps, device), device)
    link = measured.measure(repeats=repeats, device=device, params=params or measured.LARGE)
    return Measured(step_s, params, world_size(), link.latency_s, link.bandwidth_gbit_s)


def _step_s(step: Callable[[], object], steps: int, device: torch.device) -> float:
    for _ in range(max(1, steps // 5)):
        step()
    seconds = []
    for _ in range(steps):
        start = measured.now(device)
        step()
        seconds.append(measured.now(device) - start)
    return statistics.median(seconds)
