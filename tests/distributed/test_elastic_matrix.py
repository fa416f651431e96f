"""Every fault at every moment of the communication thread, for every kind of rule, delay, number of fragments and codec.

A seeded selection of all that there are (`make chaos` with `CASES=all` runs every one, for hours).
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from distoptim.comm.elastic import MeanThread
from distoptim.comm.generation import Among, Generation
from distoptim.testing.processes import run
from tests.helpers import elastic
from tests.helpers.elastic import TAU, Worker, stop_for, write

# Read when torchft is imported, which prints every question of every worker without it.
os.environ.setdefault("RUST_LOG", "warn")
pytest.importorskip("torchft", reason="workers that come and go need distoptim[elastic]")

address = elastic.address
SELECTED = 12
# A stopped worker is waited for so long.
TIMEOUT_S = 3.0

# What is called then, in the launch at which it happens; and whether it happens after it.
MOMENTS: dict[str, tuple[Any, str, bool]] = {
    "before the question": (MeanThread, "_members", False),
    "between answer and group": (MeanThread, "_members", True),
    "while the group is built": (Generation, "_gather_at", False),
    "when the group is there": (MeanThread, "form", True),
    "as giver": (Generation, "give", False),
    "having given": (Generation, "give", True),
    "as receiver": (Generation, "receive", False),
    "having received": (Generation, "receive", True),
    "before the mean": (MeanThread, "_all_reduce", False),
    "in the mean": (Among, "all_reduce", True),
    "in a coded mean": (Among, "all_gather", True),
    "after the last piece": (MeanThread, "_all_reduce", True),
    "received, not merged": (MeanThread, "_note_made", True),
    "leaving the group": (MeanThread, "leave_group", False),
}
FAULTS = ("kill", "leave", "stop", "stop for long", "slow", "exception")
GONE = ("kill", "leave", "exception")
RULES: dict[str, dict[str, Any]] = {
    "local-sgd": {},
    "overlap-local-sgd": {},
    "diloco": {"adamw": True, "lr": 0.005},
    "co2": {},
}
ALL = [
    case
    for case in itertools.product(FAULTS, MOMENTS, RULES, (0, TAU), (1, 3), (None, "int8+ef"))
    if not (case[2] == "local-sgd" and (case[4] > 1 or case[3]))
    and not (case[2] in ("overlap-local-sgd", "co2") and not case[3])
    and (case[5] is not None) >= (case[1] == "in a coded mean")
    and (case[5] is None) >= (case[1] == "in the mean")
]


def selected() -> list[Any]:
    if os.environ.get("CASES") == "all":
        return ALL
    return random.Random(os.environ.get("CASES", "0")).sample(ALL, SELECTED)


def happen(fault: str, folder: Path) -> None:
    """To this process, from its communication thread."""
    if fault in GONE:
        (folder / "over").touch()
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "leave":
        os.kill(os.getpid(), signal.SIGTERM)
    elif fault == "stop":
        stop_for(0.3)
    elif fault == "stop for long":
        stop_for(2 * TIMEOUT_S)
    elif fault == "slow":
        time.sleep(1.0)
    else:
        os.kill(os.getpid(), signal.SIGUSR1)
    (folder / "over").touch()


def prepare(fault: str, moment: str, folder: Path, launch: int) -> None:
    """Let it happen once, in one of this process's launches that come to that moment."""
    owner, name, after = MOMENTS[moment]
    step = getattr(owner, name)
    calls = 0

    def made(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        now = calls == launch
        if now and not after:
            happen(fault, folder)
        out = step(*args, **options)
        if now and after:
            happen(fault, folder)
        return out

    setattr(owner, name, made)


def raises(kind: type[BaseException]) -> Any:
    def handler(*_: Any) -> None:
        raise kind

    return handler


def live(rank: int, address: str, case: Any, folder: Path) -> dict[str, Any] | None:
    """a and b begin; c joins, so that there are one that gives and one that receives; one of them has the fault."""
    fault, moment, rule, delay, fragments, codec = case
    name = "abc"[rank]
    victim = "a" if moment in ("as giver", "having given") else "c"
    options = {**RULES[rule], "fragments": fragments, "codec": codec, "delay": delay}
    options |= {"carry": True} if rule == "diloco" and delay else {}
    while rank == 2 and not (folder / "begun").exists():
        time.sleep(0.01)
    if name == victim:
        # The first, of what happens once in a life; else one in the middle.
        rare = moment not in ("as giver", "having given", "as receiver", "having received")
        group = moment in ("while the group is built", "leaving the group")
        prepare(fault, moment, folder, 4 if rare and not group else 1)
        signal.signal(signal.SIGTERM, raises(SystemExit))
        signal.signal(signal.SIGUSR1, raises(ZeroDivisionError))
    end = folder / "end"
    known: int | None = None
    try:
        worker = Worker(name, address, rule, start=2, timeout_s=TIMEOUT_S, options=options)
        while not end.exists() or worker.optimizer.local_step < int(end.read_text()):
            worker.step()
            if len(worker.held) == 5:
                (folder / "begun").touch()
            over = (folder / "over").exists() and not end.exists()
            # Who lives is in a mean again, by its own account; who does not is in none, by another's.
            if fault in GONE:
                over &= rank == 1 and len(worker.workers.members) == 2
            else:
                known = len(worker.held) if known is None and over else known
                over &= name == victim and known is not None and len(worker.held) > known + 1
            if over:
                write(end, worker.optimizer.local_step + 30 * TAU)
    except (SystemExit, ZeroDivisionError):
        if "worker" in locals():
            worker.optimizer.close()
        return None
    return worker.found()


@pytest.mark.soak
@pytest.mark.parametrize("case", selected(), ids=lambda case: "-".join(str(part) for part in case))
def test_survivors_hold_the_same_whatever_happens_whenever(address, tmp_path, case):
    """P1, P2, P3: they go on, lose no local step, and hold the same after every mean that they have made together."""
    fault, moment, *_ = case
    dead = {0 if moment in ("as giver", "having given") else 2: -9} if fault == "kill" else {}
    found = run(
        live, 3, address, case, tmp_path, backend=None, expect_exit=dead, timeout_s=240
    )  # fmt: skip
    left = [one for one in found if one is not None]
    assert len(left) == (2 if fault in GONE else 3)
    held = [one["held"] for one in left]
    common = set.intersection(*({*each} for each in held))
    assert len(common) >= 3
    assert all(len({each[count] for each in held}) == 1 for count in common)
