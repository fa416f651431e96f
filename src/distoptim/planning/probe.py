"""Time the real step and the real link, for the planner.

Run it under torchrun, one process per worker.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from distoptim import checks

SMALL, LARGE = 1, 4 * 2**20
"""Elements of the two all-reduces: one shows the latency, both together the rate."""


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
        """Plain data."""
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
    if not dist.is_torchelastic_launched():
        raise ValueError(
            "start it with torchrun: torchrun --nproc-per-node=... -m distoptim probe ..."
        )
    prepare = load(target)
    dist.init_process_group(backend or ("nccl" if torch.cuda.is_available() else "gloo"))
    if dist.get_world_size() < 2:
        raise ValueError("one worker has no link: allowed are 2 or more")
    measured = probe(prepare, steps=steps)
    first = dist.get_rank() == 0
    dist.destroy_process_group()
    return measured if first else None


def probe(prepare: Callable[[], Any], *, steps: int = 20, repeats: int = 5) -> Measured:
    """Time local steps and all-reduces on all workers; collective.

    Args:
        prepare: called once; returns a step (a function without arguments that trains for one local
            step without communication), or a pair of the model and such a step.
        steps: timed, after a fifth as many for warming up.
        repeats: of each all-reduce; the median counts.

    Raises:
        ValueError: a value outside its range.
    """
    checks.integer("steps", steps, 1)
    checks.integer("repeats", repeats, 1)
    prepared = prepare()
    model, step = prepared if isinstance(prepared, tuple) else (None, prepared)
    params = (
        sum(p.numel() for p in model.parameters() if p.requires_grad) if model is not None else 0
    )
    device = next(model.parameters()).device if model is not None else torch.device("cpu")
    step_s = torch.tensor([_step_s(step, steps, device)], device=device)
    dist.all_reduce(step_s, op=dist.ReduceOp.MAX)
    small, large = (_all_reduce_s(numel, repeats, device) for numel in (SMALL, LARGE))
    n = dist.get_world_size()
    latency_s = small / (2 * (n - 1))
    bits = 2 * (n - 1) / n * (LARGE - SMALL) * 4 * 8
    return Measured(step_s.item(), params, n, latency_s, bits / max(large - small, 1e-9) / 1e9)


def _step_s(step: Callable[[], object], steps: int, device: torch.device) -> float:
    for _ in range(max(1, steps // 5)):
        step()
    seconds = []
    for _ in range(steps):
        start = _now(device)
        step()
        seconds.append(_now(device) - start)
    return statistics.median(seconds)


def _all_reduce_s(numel: int, repeats: int, device: torch.device) -> float:
    """Median seconds of a mean of `numel` floats, the same number on all workers."""
    buffer = torch.ones(numel, device=device)
    seconds = []
    for _ in range(repeats + 1):
        dist.barrier()
        start = _now(device)
        dist.all_reduce(buffer, op=dist.ReduceOp.MAX)
        seconds.append(_now(device) - start)
    median = torch.tensor([statistics.median(seconds[1:])], device=device)
    dist.all_reduce(median, op=dist.ReduceOp.MAX)
    return median.item()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
