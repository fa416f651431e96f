"""Checkpoints of 4 workers in lockstep, in mid-round, and how they went on.

`python -m tests.laws.checkpoints` writes them anew with the version there is: not over those of an older one.
"""

from __future__ import annotations

import gzip
import io
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import distoptim
from distoptim import ALGORITHMS
from distoptim.periods import PostLocal, Schedule
from distoptim.testing.lockstep import Lockstep
from tests.helpers import toy
from tests.laws.trajectories import FLOAT64, WORKERS, Problem, digest, environment, problem

FOLDER = Path(__file__).parents[1] / "reference" / "checkpoints"
SAVED_AT, GOES_ON, SEEN = 13, 15, (1, 4, 9, 15)
# The fewest blocks of a codec of which a mean of 4 workers goes in two stages: 3.
TWO_STAGES = problem([(23, 23), (5,)], torch.float32)
OUTER_ADAM = partial(torch.optim.Adam, lr=0.1)

Make = Callable[..., Any]


def algorithm(name: str, **options: Any) -> Make:
    return partial(ALGORITHMS[name], **{**toy.OPTIONS, "tau": 5, **options})


def around_adamw(name: str, **options: Any) -> Make:
    return lambda params, communicator: ALGORITHMS[name](
        torch.optim.AdamW(params, lr=0.05), communicator=communicator, tau=5, **options
    )


# Rounds end at steps 5, 10 and 15; where nothing else is said means are in flight for all of a round.
KINDS: dict[str, tuple[Problem, Make]] = {
    "overlap-local-sgd": (FLOAT64, algorithm("overlap-local-sgd")),
    "cocod-sgd": (FLOAT64, algorithm("cocod-sgd")),
    "diloco-outer-adam": (FLOAT64, around_adamw("diloco", outer=OUTER_ADAM, delay=4, carry=True)),
    "diloco-blocking": (FLOAT64, algorithm("diloco")),
    "streaming-diloco-fragments3": (FLOAT64, algorithm("streaming-diloco", fragments=3, delay=4)),
    "eager-diloco": (FLOAT64, algorithm("eager-diloco")),
    "co2": (FLOAT64, algorithm("co2")),
    "overlap-bmuf": (FLOAT64, algorithm("overlap-bmuf")),
    "easgd": (FLOAT64, algorithm("easgd")),
    "bmuf-carry": (FLOAT64, algorithm("bmuf", delay=4, carry=True)),
    "slowmo-carry": (FLOAT64, algorithm("slowmo", delay=4, carry=True)),
    "local-sgd-late": (FLOAT64, algorithm("local-sgd", delay=4)),
    "codec-int8-two-stages": (TWO_STAGES, algorithm("overlap-local-sgd", codec="int8+ef")),
    "post-local-synchronous": (
        FLOAT64,
        algorithm("overlap-local-sgd", tau=PostLocal(start=17, tau=3)),
    ),
    "schedule": (FLOAT64, algorithm("cocod-sgd", tau=Schedule({0: 2, 5: 4, 16: 3}))),
}


def write(folder: Path, name: str) -> None:
    """One file for all workers."""
    of, make = KINDS[name]
    cluster = Lockstep(make, [of.start] * WORKERS)
    cluster.run(SAVED_AT, of.gradient)
    file = io.BytesIO()
    # As bytes, since what a state dict holds moves on with the cluster.
    torch.save(
        [
            {"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}
            for params, optimizer in zip(cluster.params, cluster.optimizers, strict=True)
        ],
        file,
    )
    file.seek(0)
    workers = torch.load(file, weights_only=True)
    x = cluster.run(GOES_ON, of.gradient)
    out = io.BytesIO()
    torch.save(
        {
            "version": distoptim.__version__,
            "environment": environment(),
            "step": SAVED_AT,
            "workers": workers,
            "digest": digest(x),
            "x": x[[step - 1 for step in SEEN]],
        },
        out,
    )
    (folder / f"{name}.pt.gz").write_bytes(gzip.compress(out.getvalue(), mtime=0))


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(
        io.BytesIO(gzip.decompress((FOLDER / f"{name}.pt.gz").read_bytes())), weights_only=True
    )
    return found


def load(name: str, saved: dict[str, Any]) -> Lockstep:
    """A new cluster that has loaded what the old one saved.

    Raises:
        ValueError: this version does not read it.
    """
    of, make = KINDS[name]
    cluster = Lockstep(make, [[torch.zeros_like(p) for p in of.start]] * WORKERS)
    for params, optimizer, worker in zip(
        cluster.params, cluster.optimizers, saved["workers"], strict=True
    ):
        with torch.no_grad():
            torch._foreach_copy_(list(params), worker["params"])
        optimizer.load_state_dict(worker["optimizer"])
    return cluster


def main(folder: str | Path = FOLDER) -> None:
    torch.set_num_threads(1)
    for name in KINDS:
        write(Path(folder), name)


if __name__ == "__main__":
    main(*sys.argv[1:])
