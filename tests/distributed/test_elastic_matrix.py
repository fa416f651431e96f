"""Every fault at every moment of a worker's life, for every kind of rule, delay, number of fragments and codec.

A seeded selection of all that there are (`make chaos` with `CASES=all` runs every one, for hours).
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distoptim import AveragingOptimizer
from distoptim.comm.elastic import MeanThread
from distoptim.comm.generation import Among, Generation
from distoptim.engine.engine import Engine
from distoptim.testing.processes import free_port, run
from tests.helpers.elastic import (
    HEARTBEAT_S,
    TAU,
    Wire,
    Worker,
    lighthouse,
    stop_for,
    strike_at,
    write,
)

# Read when torchft is imported, which prints every question of every worker without it.
os.environ.setdefault("RUST_LOG", "warn")
pytest.importorskip("torchft", reason="workers that come and go need distoptim[elastic]")

SELECTED = 16
# Whether who is missed comes back; nobody may wait so long for who is gone.
TIMEOUT_S = {True: 3.0, False: 30.0}
# Rounds in a run whose end is known before.
ROUNDS = 15

# What is called then, and whether it happens after it.
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
    "in a mean of 4 MB": (Among, "all_reduce", True),
    "in a coded mean": (Among, "all_gather", True),
    "after the last piece": (MeanThread, "_all_reduce", True),
    "received, not merged": (MeanThread, "_note_made", True),
    "in the merge": (Engine, "merge", True),
    "in averaged()": (AveragingOptimizer, "averaged", False),
    "in flush()": (MeanThread, "_all_reduce", True),
    "in the last round": (MeanThread, "_all_reduce", True),
    "after the end": (Worker, "found", False),
    "leaving the group": (MeanThread, "leave_group", False),
}
# Once in a life, or not in every launch: the first time. Else in the fourth.
FIRST = ("as giver", "having given", "as receiver", "having received", "leaving the group")
FIRST += ("while the group is built", "in averaged()", "in flush()", "after the end")
# Where the end of the run is known from its begin on, by all.
ENDS = ("in the last round", "after the end")

GONE = ("kill", "leave", "exception", "all but one are killed")
STANDS = ("stop", "stop for long", "slow")
FAULTS = (*GONE, *STANDS, "nan", "link cut", "lighthouse killed")
RULES: dict[str, dict[str, Any]] = {
    "local-sgd": {},
    "overlap-local-sgd": {},
    "diloco": {"adamw": True, "lr": 0.005},
    "co2": {},
}


def is_one(case: tuple[Any, ...]) -> bool:
    """Whether there is such a thing."""
    fault, moment, rule, delay, fragments, codec = case
    if rule == "local-sgd" and (fragments > 1 or delay):
        return False
    if rule in ("overlap-local-sgd", "co2") and not delay:
        return False
    if (codec is None) == (moment == "in a coded mean"):
        return False
    if codec is not None and moment in ("in the mean", "in a mean of 4 MB"):
        return False
    # Who has ended is told by nobody that it was missed, and one that stands still ends later.
    return moment not in ENDS or fault in (*GONE, "nan")


ALL = [
    case
    for case in itertools.product(FAULTS, MOMENTS, RULES, (0, TAU), (1, 3), (None, "int8+ef"))
    if is_one(case)
]


# Each found that a worker which came back in a call that the others were past ended them all.
ALWAYS = [
    ("link cut", "in flush()", "diloco", TAU, 3, None),
    ("stop for long", "in averaged()", "local-sgd", 0, 1, None),
]


def selected() -> list[Any]:
    rest = [case for case in ALL if case not in ALWAYS]
    if os.environ.get("CASES") != "all":
        rest = random.Random(os.environ.get("CASES", "0")).sample(rest, SELECTED)
    return [*ALWAYS, *(pytest.param(case, marks=pytest.mark.soak) for case in rest)]


@pytest.fixture
def addresses(tmp_path: Path) -> Iterator[list[str]]:
    """At which a, b and c reach a lighthouse, until one asks for its way to be cut, or for the lighthouse to be killed."""
    port = free_port()
    servers = [lighthouse(port)]
    wires = {name: Wire(f"127.0.0.1:{port}") for name in "abc"}
    over = threading.Event()

    def mend(asked: Path) -> None:
        fault, _, name = asked.name.rpartition(" ")
        if fault == "link cut":
            wires[name].cut()
            # For longer than it is taken for alive.
            over.wait(2 * HEARTBEAT_S)
            wires[name].is_cut = False
        else:
            servers.pop().shutdown()
            over.wait(1.0)
            servers.append(lighthouse(port))
        asked.unlink()
        (tmp_path / "over").touch()

    def watch() -> None:
        while not over.wait(0.01):
            for asked in [*tmp_path.glob("link cut *"), *tmp_path.glob("lighthouse killed *")]:
                mend(asked)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield [wire.address for wire in wires.values()]
    over.set()
    thread.join()
    servers.pop().shutdown()


class Life:
    """A worker's, of which one has the fault.

    a and b begin, and c joins, so that there are one that gives and one that receives. Where the end is
    known before, all begin together.
    """

    def __init__(self, rank: int, case: Any, folder: Path) -> None:
        self.fault, self.moment, self.rule, delay, fragments, codec = case
        self.name = "abc"[rank]
        self.folder = folder
        self.is_victim = self.name == ("a" if self.moment in ("as giver", "having given") else "c")
        self.options = {**RULES[self.rule], "fragments": fragments, "codec": codec, "delay": delay}
        self.options |= {"carry": True} if self.rule == "diloco" and delay else {}
        # So wide that its mean has 4 MB, and stays finite.
        self.is_wide = self.moment == "in a mean of 4 MB"
        self.options |= {"lr": 1e-6} if self.is_wide else {}
        self.worker: Worker | None = None
        self.times = 0
        self.flushes = False
        self.spoils = False
        self.longest_s = 0.0

    def live(self, address: str) -> dict[str, Any]:
        ends = self.moment in ENDS
        while self.name == "c" and not ends and not (self.folder / "begun").exists():
            time.sleep(0.01)
        if ends:
            write(self.folder / "end", ROUNDS * TAU)
        write(self.folder / f"pid-{self.name}", os.getpid())
        if self.is_victim:
            self.prepare()
        worker = Worker(
            self.name,
            address,
            self.rule,
            start=3 if ends else 2,
            timeout_s=TIMEOUT_S[self.fault not in GONE],
            width=100_000 if self.is_wide else 8,
            options=self.options,
        )
        self.worker = worker
        self.train(worker)
        finite = all(p.isfinite().all() for p in worker.model.parameters())
        step = worker.optimizer.local_step
        return {**worker.found(), "finite": finite, "step": step, "longest_s": self.longest_s}

    def train(self, worker: Worker) -> None:
        end = self.folder / "end"
        merged_at = time.monotonic()
        known: int | None = None
        while not end.exists() or worker.optimizer.local_step < int(end.read_text()):
            before = len(worker.held)
            self.step(worker)
            if len(worker.held) > before:
                self.longest_s = max(self.longest_s, time.monotonic() - merged_at)
                merged_at = time.monotonic()
            if len(worker.held) == 5:
                (self.folder / "begun").touch()
            over = (self.folder / "over").exists() and not end.exists()
            # Who lives is in a mean again, by its own account; who does not is in none, by another's.
            if self.fault in GONE:
                over &= self.name == "b" and len(worker.workers.members) == 3 - self.dead
            else:
                known = len(worker.held) if known is None and over else known
                over &= self.is_victim and known is not None and len(worker.held) > known + 1
            if over:
                write(end, worker.optimizer.local_step + 15 * TAU)

    def step(self, worker: Worker) -> None:
        if self.spoils:
            self.spoils = False
            with torch.no_grad():
                next(worker.model.parameters()).fill_(torch.nan)
        worker.step()
        # In the middle of a round, so that there is something to average.
        if worker.optimizer.local_step % (6 * TAU + 1) == 2:
            if self.moment == "in averaged()":
                with worker.optimizer.averaged(worker.model):
                    pass
            if self.moment == "in flush()":
                self.flushes = True
                worker.optimizer.flush()
                self.flushes = False

    @property
    def dead(self) -> int:
        return 2 if self.fault == "all but one are killed" else 1

    def prepare(self) -> None:
        """Let it happen once, when this process comes to that moment."""
        owner, name, after = MOMENTS[self.moment]
        strike_at(owner, name, self.strike, after=after, its_time=self.its_time)
        signal.signal(signal.SIGTERM, raises(SystemExit))
        signal.signal(signal.SIGUSR1, raises(ZeroDivisionError))

    def its_time(self) -> bool:
        if self.moment == "in flush()" and not self.flushes:
            return False
        if self.moment == "in the last round":
            begun = self.worker is not None
            late = begun and self.worker.optimizer.local_step >= (ROUNDS - 1) * TAU
            self.times += late
            return self.times == 1 and late
        self.times += 1
        return self.times == (1 if self.moment in FIRST else 4)

    def strike(self) -> None:
        """From whatever thread is at that moment."""
        if self.fault in ("link cut", "lighthouse killed"):
            # Over when it is mended.
            (self.folder / f"{self.fault} {self.name}").touch()
            return
        if self.fault in GONE:
            (self.folder / "over").touch()
        if self.fault == "all but one are killed":
            other = "a" if self.name == "c" else "c"
            os.kill(int((self.folder / f"pid-{other}").read_text()), signal.SIGKILL)
        if self.fault in ("kill", "all but one are killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.fault == "leave":
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.fault == "exception":
            os.kill(os.getpid(), signal.SIGUSR1)
        elif self.fault == "stop":
            stop_for(0.3)
        elif self.fault == "stop for long":
            stop_for(2 * TIMEOUT_S[True])
        elif self.fault == "slow":
            time.sleep(1.0)
        else:
            self.spoils = True
        (self.folder / "over").touch()


def raises(kind: type[BaseException]) -> Any:
    def handler(*_: Any) -> None:
        raise kind

    return handler


def live(rank: int, addresses: list[str], case: Any, folder: Path) -> dict[str, Any] | None:
    life = Life(rank, case, folder)
    try:
        return life.live(addresses[rank])
    except (SystemExit, ZeroDivisionError):
        if life.worker is not None:
            life.worker.optimizer.close()
        return None


@pytest.mark.parametrize("case", selected(), ids=lambda case: "-".join(str(part) for part in case))
def test_survivors_hold_the_same_whatever_happens_whenever(addresses, tmp_path, case):
    """P1, P2, P3: they go on soon, lose no local step, and hold the same after every mean that they have made together."""
    fault, moment, *_ = case
    victims = {0} if moment in ("as giver", "having given") else {2}
    if fault == "all but one are killed":
        victims = {0, 2}
    dead = dict.fromkeys(victims, -9) if "kill" in fault and fault in GONE else {}
    found = run(
        live, 3, addresses, case, tmp_path, backend=None, expect_exit=dead, timeout_s=240
    )  # fmt: skip
    left = [one for one in found if one is not None]
    assert len(left) == (3 - len(victims) if fault in GONE else 3)
    held = [one["held"] for one in left]
    common = set.intersection(*({*each} for each in held))
    assert len(common) >= 3
    assert all(len({each[count] for each in held}) == 1 for count in common)
    assert all(one["finite"] for one in left)
    for one in left:
        # A catch-up takes over the others' count.
        assert one["catch_ups"] or one["step"] - one["began"] == one["steps"]
        assert fault not in GONE or one["longest_s"] < TIMEOUT_S[False] / 3
