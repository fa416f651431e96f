"""Runs of real workers in which one is handed, has, or does something else than the others; drawn from a seed.

Chaos strikes processes; here they live, and everything that one does is a user's mistake: either nothing is
wrong with it, or all workers are told, by an error that says what.
"""

from __future__ import annotations

import contextlib
import random
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distoptim import ALGORITHMS, CommunicationError
from distoptim.checksum import checksum
from distoptim.periods import PostLocal
from distoptim.testing.inspection import inspect

TIMEOUT_S = 30.0
STEPS = 17


def module() -> nn.Sequential:
    """Large enough for codes in two stages; with statistics, and a buffer that is none."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40), nn.Linear(40, 8))
    made.register_buffer("table", torch.ones(3))
    return made


def _raise(*_: Any, **__: Any) -> None:
    raise ArithmeticError("of the user's own")


def _frozen(m: Any, options: dict[str, Any]) -> None:
    m[0].weight.requires_grad_(False)


# On one worker, before its optimizer is made.
MADE: dict[str, Callable[[Any, dict[str, Any]], object]] = {
    "tau": lambda m, options: options.update(tau=12),
    "no tau": lambda m, options: options.update(tau=0),
    "codec": lambda m, options: options.update(codec="1bit"),
    "fragments": lambda m, options: options.update(fragments=7),
    "streams": lambda m, options: options.update(streams=3),
    "reset": lambda m, options: options.update(reset_inner=True),
    "learning rate": lambda m, options: options.update(lr="high"),
    "size": lambda m, options: options.update(size=17),
    "communicator": lambda m, options: options.update(communicator=3),
    "group": lambda m, options: options.update(group="all"),
    "timeout": lambda m, options: options.update(timeout_s=-1),
    "no such option": lambda m, options: options.update(speed=3),
    "no module": lambda m, options: options.update(module=None),
    "dtype": lambda m, options: m.double(),
    "shape": lambda m, options: m.append(nn.Linear(2, 2)),
    "frozen": _frozen,
    "no buffer": lambda m, options: m.register_buffer("table", None),
    "shape of a buffer": lambda m, options: m.register_buffer("table", torch.ones(4)),
    "sparse buffer": lambda m, options: m.register_buffer("table", torch.ones(3).to_sparse()),
    "meta": lambda m, options: m.to("meta"),
}
# By one worker alone, before a call of average().
DONE: dict[str, Callable[[Any, Any], object]] = {
    "averaged": lambda o, m: o.averaged(m).__enter__(),
    "averaged a copy": lambda o, m: o.averaged(nn.Linear(3, 2)).__enter__(),
    "flush": lambda o, m: o.flush(),
    "consolidate": lambda o, m: o.consolidate(),
    "load": lambda o, m: o.load_state_dict(o.state_dict()),
    "load nothing": lambda o, m: o.load_state_dict(None),
    "average": lambda o, m: o.average(),
    "samples": lambda o, m: o.average(samples=2),
    "average its own": lambda o, m: o.average_module(m),
    "closure": lambda o, m: o.step(_raise),
    "hook": lambda o, m: (o.register_step_pre_hook(_raise), o.step()),
    "unfreeze": lambda o, m: m.append(nn.Linear(2, 2)),
    "convert": lambda o, m: m.double(),
    "close": lambda o, m: o.close(),
}
# The same, where nothing is wrong with it.
FINE: dict[str, Callable[[Any, Any], object]] = {
    "NaN": lambda o, m: m[0].weight.data.fill_(float("nan")),
    "save": lambda o, m: o.state_dict(),
    "zero_grad": lambda o, m: o.zero_grad(),
    "freeze": lambda o, m: m[0].weight.requires_grad_(False),
}


@dataclass(frozen=True)
class Case:
    """One run; `at` is the local step at which the victim acts."""

    seed: int
    algorithm: str
    options: dict[str, Any]
    levels: bool
    act: str
    victim: int
    at: int


def draw(seed: int, workers: int) -> Case:
    """The run of a seed."""
    rng = random.Random(seed)
    levels = workers == 4 and rng.random() < 0.7
    tau = rng.choice([4, 6] if levels else [1, 2, 4, 6])
    fragments = rng.randint(1, min(3, tau))
    post_local = rng.random() < 0.2
    return Case(
        seed=seed,
        algorithm=rng.choice(list(ALGORITHMS)),
        options={
            "tau": PostLocal(start=rng.choice([3, 8]), tau=6) if post_local else tau,
            "fragments": 1 if post_local else fragments,
            "codec": rng.choice([None, None, "int8", "int8+ef"]),
            "streams": rng.choice([1, 2, "auto"]),
        },
        levels=levels,
        act=rng.choice([*MADE, *DONE, *FINE]),
        victim=rng.randrange(workers),
        at=rng.randint(1, STEPS - 4),
    )


def work(rank: int, workers: int, seeds: range) -> list[tuple[str, int]]:
    """In a worker: of each seed the error that it was told, or a checksum of all that is to be equal."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])] if workers == 4 else []
    told = []
    for seed in seeds:
        case = draw(seed, workers)
        groups = {2: pairs[rank // 2]} if case.levels else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            told.append(_attempt(rank, case, groups))
        dist.barrier()
    return told


def _attempt(rank: int, case: Case, groups: Any) -> tuple[str, int]:
    optimizer = None
    try:
        trained = module()
        options = {"lr": 0.05, "timeout_s": TIMEOUT_S, "module": trained, "levels": groups}
        options |= case.options
        if rank == case.victim and case.act in MADE:
            MADE[case.act](trained, options)
        optimizer = ALGORITHMS[case.algorithm](trained.parameters(), **options)
        return "", _train(rank, case, optimizer, trained)
    except Exception as error:  # noqa: BLE001  # what it may be, the verdict says
        return f"{type(error).__name__}: {error}", 0
    finally:
        # Of what this worker was not told out of a call of ours, the others are told so.
        if optimizer is not None:
            with contextlib.suppress(CommunicationError):
                optimizer.close()


def _train(rank: int, case: Case, optimizer: Any, trained: nn.Module) -> int:
    generator = torch.Generator().manual_seed(rank)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        trained(torch.randn(8, 40, generator=generator)).square().mean().backward()
        optimizer.step()
        if (rank, step) == (case.victim, case.at):
            {**DONE, **FINE, **dict.fromkeys(MADE, lambda *_: None)}[case.act](optimizer, trained)
        optimizer.average()
    with optimizer.averaged():
        mean = checksum(list(trained.parameters()))
    shared = checksum(inspect(optimizer).shared())
    optimizer.close()
    return mean ^ shared


def judge(case: Case, told: list[tuple[str, int]]) -> None:
    """See that all was well, or that all were told what was not.

    Raises:
        AssertionError: neither.
    """
    errors = [error for error, _ in told]
    said = "\n".join([str(case), *errors])
    if case.act in FINE:
        assert not any(errors), said
        assert len(set(told)) == 1, said
    else:
        assert all(errors), said
        unnamed = r"failed( after)? [\d.]+ s|Connection closed|timed out"
        assert not any(re.search(unnamed, error) for error in errors), said
