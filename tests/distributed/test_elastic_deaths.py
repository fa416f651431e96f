"""Workers that are killed at a chosen point of a launch, also while they join a run or give to who joins."""

from __future__ import annotations

import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from distoptim.comm.elastic import MeanThread
from distoptim.testing.processes import run
from tests.helpers import elastic
from tests.helpers.elastic import TAU, Worker, strike_at, write

# Read when torchft is imported, which prints every question of every worker without it.
os.environ.setdefault("RUST_LOG", "warn")
pytest.importorskip("torchft", reason="workers that come and go need distoptim[elastic]")

address = elastic.address
# Nobody may wait for so long.
TIMEOUT_S = 30.0


def die_at(point: str, folder: Path, *, after: bool, launch: int) -> None:
    """Be killed before or after a step of the communication thread, in one of its launches."""
    calls = itertools.count(1)

    def die() -> None:
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    strike_at(MeanThread, point, die, after=after, its_time=lambda: next(calls) == launch)


def walk(
    rank: int, address: str, algorithm: str, dying: str, point: str, after: bool, folder: Path
) -> dict[str, Any]:
    """b lives; a, or c, dies: c in its fifth launch ("c") or as one that joins ("join")."""
    name = "abc"[rank]
    joins = dying != "c"
    if rank == 2 and joins:
        while not (folder / "begun").exists():
            time.sleep(0.01)
    if name == dying or (dying == "join" and rank == 2):
        die_at(point, folder, after=after, launch=5 if dying == "c" else 1)
    worker = Worker(name, address, algorithm, start=2 if joins else 3, timeout_s=TIMEOUT_S)
    end = folder / "end"
    longest_s = 0.0
    last = time.monotonic()
    merged = 0
    while not end.exists() or worker.optimizer.local_step < int(end.read_text()):
        worker.step()
        if len(worker.held) != merged:
            merged = len(worker.held)
            longest_s = max(longest_s, time.monotonic() - last)
            last = time.monotonic()
        if merged == 5:
            (folder / "begun").touch()
        if rank == 1 and (folder / "died").exists() and not end.exists():
            write(end, worker.optimizer.local_step + 8 * TAU)
    return {**worker.found(), "longest_s": longest_s}


@pytest.mark.parametrize(
    ("algorithm", "dying", "point", "after"),
    [
        ("overlap-local-sgd", "c", "_members", True),  # between the answer and the group
        ("co2", "c", "_all_reduce", False),
        pytest.param("easgd", "c", "_all_reduce", True, marks=pytest.mark.soak),
        ("diloco", "join", "_members", True),
        ("slowmo", "join", "_catch_up", False),
        pytest.param("overlap-bmuf", "join", "_catch_up", True, marks=pytest.mark.soak),
        ("eager-diloco", "a", "_catch_up", False),  # which gives
    ],
)
def test_a_death_costs_the_others_no_more_than_a_heartbeat(
    address, tmp_path, algorithm, dying, point, after
):
    """P1: also while one joins, or gives to one that does."""
    dead = 0 if dying == "a" else 2
    found = run(
        walk, 3, address, algorithm, dying, point, after, tmp_path,
        backend=None, expect_exit={dead: -9},
    )  # fmt: skip
    first, second = (one for one in found if one is not None)
    for one in (first, second):
        assert one["members"] == sorted({"a", "b", "c"} - {"abc"[dead]})
        assert one["lost"] <= 1
        assert one["longest_s"] < TIMEOUT_S / 3
    common = first["held"].keys() & second["held"].keys()
    assert len(common) >= 5
    assert all(first["held"][count] == second["held"][count] for count in common)
