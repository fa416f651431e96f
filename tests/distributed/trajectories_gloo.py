"""What 4 real gloo processes compute: levels, join, samples, flush, codecs; to be held to a record of it.

`python -m tests.distributed.trajectories_gloo` writes the record anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distoptim import ALGORITHMS
from distoptim.periods import AdaComm, PostLocal, Schedule
from distoptim.testing.processes import run
from tests.helpers import toy
from tests.laws import trajectories as lockstep
from tests.laws.trajectories import CODED, FLOAT64, STEPS, WORKERS, Problem

RECORD = Path(__file__).parents[1] / "reference" / "trajectories_gloo.npz"
# Local steps of a worker inside `join()`, and of all behind it.
OWN, BEHIND = (9, 14, 20, 17), 15
Case = Callable[[int, Mapping[str, Any]], Tensor]


def go(
    name: str,
    rank: int,
    groups: Mapping[str, Any],
    *,
    levels: Mapping[int, str] | None = None,
    of: Problem = FLOAT64,
    uneven: bool = False,
    flush_at: int = 0,
    samples: bool = False,
    loss: bool = False,
    **options: Any,
) -> Tensor:
    """[STEPS, dimension]: x of this worker after every step.

    Args:
        name: of the algorithm.
        rank: of this worker.
        groups: this worker's, by name.
        levels: period -> name of a group.
        of: the problem.
        uneven: begin with OWN steps inside `join()`; the rest up to STEPS - BEHIND is what it ends with.
        flush_at: the step after which to flush.
        samples: say other numbers of them at every step.
        loss: report one.
        options: the algorithm's.
    """
    params = [torch.nn.Parameter(p.clone()) for p in of.start]
    if levels:
        options["levels"] = {period: groups[which] for period, which in levels.items()}
    optimizer = ALGORITHMS[name](params, **{**toy.OPTIONS, "tau": 4, **options})
    out: list[Tensor] = []

    def train(steps: int) -> None:
        for _ in range(steps):
            for p, g in zip(params, of.gradient(rank, [p.detach() for p in params]), strict=True):
                p.grad = g
            optimizer.step()
            optimizer.zero_grad()
            step = len(out) + 1
            said: dict[str, float] = {}
            if samples:
                said["samples"] = float((3 * rank + step) % 5)
            if loss:
                said["loss"] = (1 + 0.25 * rank) * max(0.85**step, 0.1)
            optimizer.average(**said)
            if step == flush_at:
                optimizer.flush()
            out.append(x())

    def x() -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in params]).clone()

    if uneven:
        with optimizer.join():
            train(OWN[rank])
        out.extend([x()] * (STEPS - BEHIND - len(out)))
    train(STEPS - len(out))
    optimizer.close()
    return torch.stack(out)


PAIRS = {2: "pairs"}
PHASES = PostLocal(start=3, tau=Schedule({0: 4, 9: 8}))
OUTER_ADAM = partial(torch.optim.Adam, lr=0.1)
CASES: dict[str, Case] = {
    "exact: overlap-local-sgd": partial(go, "overlap-local-sgd"),
    "exact: diloco, outer Adam, 3 fragments": partial(go, "diloco", outer=OUTER_ADAM, fragments=3),
    "exact: levels overlap-local-sgd": partial(go, "overlap-local-sgd", levels=PAIRS),
    "exact: levels cocod-sgd, 2 fragments": partial(go, "cocod-sgd", levels=PAIRS, fragments=2),
    "exact: levels diloco, flushed": partial(go, "diloco", levels=PAIRS, flush_at=17),
    "exact: levels easgd, two levels": partial(go, "easgd", levels={1: "pairs", 2: "crossed"}),
    "exact: levels overlap-bmuf, delay 2": partial(go, "overlap-bmuf", levels=PAIRS, delay=2),
    "int8+ef: levels eager-diloco": partial(
        go, "eager-diloco", levels=PAIRS, codec="int8+ef", of=CODED
    ),
    "exact: levels slowmo, post-local and schedule": partial(
        go, "slowmo", levels=PAIRS, tau=PHASES
    ),
    "exact: levels co2, join": partial(go, "co2", levels=PAIRS, uneven=True),
    "exact: levels streaming-diloco, samples, 2 fragments": partial(
        go, "streaming-diloco", levels=PAIRS, samples=True, fragments=2
    ),
    "exact: levels overlap-local-sgd, join, samples, reset": partial(
        go, "overlap-local-sgd", levels=PAIRS, uneven=True, samples=True, reset_inner=True
    ),
    "exact: local-sgd, join, schedule, 2 fragments": partial(
        go, "local-sgd", uneven=True, tau=Schedule({0: 2, 5: 4}), fragments=2
    ),
    "exact: overlap-local-sgd, flushed, 3 fragments": partial(
        go, "overlap-local-sgd", flush_at=17, fragments=3
    ),
    "exact: bmuf, adacomm, flushed": partial(
        go, "bmuf", tau=AdaComm(4, interval=4), loss=True, flush_at=17
    ),
    "2bit+ef: cocod-sgd, flushed, join": partial(
        go, "cocod-sgd", codec="2bit+ef", of=CODED, uneven=True, flush_at=27
    ),
}


def worker(rank: int) -> dict[str, Tensor]:
    """All cases, one after another."""
    groups = {}
    for name, members in {"pairs": [[0, 1], [2, 3]], "crossed": [[0, 2], [1, 3]]}.items():
        made = [dist.new_group(ranks) for ranks in members]
        groups[name] = made[next(i for i, ranks in enumerate(members) if rank in ranks)]
    return {name: case(rank, groups) for name, case in CASES.items()}


def trajectories() -> dict[str, Tensor]:
    """Name -> [steps, workers, dimension]."""
    found = run(worker, WORKERS)
    return {name: torch.stack([result[name] for result in found], 1) for name in CASES}


def main(path: str | Path = RECORD) -> None:
    lockstep.record(path, trajectories())
