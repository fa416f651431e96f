"""Runs of real workers with one random fault at a random moment, and what must hold in each of them.

A run is drawn from its seed: `replay(seed)` is the same run again, up to what processes and their timing
do.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distoptim import ALGORITHMS, AveragingOptimizer, CommunicationError
from distoptim.checksum import checksum
from distoptim.testing.inspection import inspect
from distoptim.testing.processes import WorkerFailure, run
from tests.helpers import coded

ROUNDS = 4
# Of waits for workers that stand still or never come; and of those that end at once, where it is only a
# bound for what hangs.
SHORT_S, LONG_S = 4.0, 60.0
STOP_S = 0.3
# Besides the timeouts: starting processes on a busy machine.
SLACK_S = 60.0

SIGNALS = {
    "kill": signal.SIGKILL,
    "terminate": signal.SIGTERM,
    "stand still": signal.SIGSTOP,
    "pause": signal.SIGSTOP,
}
CALLS: dict[str, Callable[[Any], object]] = {
    "averaged()": lambda o: o.averaged().__enter__(),
    "flush()": lambda o: o.flush(),
    "consensus_distance()": lambda o: o.consensus_distance(),
    "consolidate()": lambda o: o.consolidate(),
    "load_state_dict()": lambda o: o.load_state_dict(o.state_dict()),
    "average_module()": lambda o: o.average_module(torch.nn.Linear(3, 2)),
    "close()": lambda o: o.close(),
}
DISAGREEMENTS = {
    "another tau": r"workers disagree on .*: rank 0 has .*, rank \d has ",
    "another shape": r"workers disagree on fragment \d: rank 0 has ",
    "no tau": r"(rank \d was refused its arguments: )?tau=0: allowed is",
}
FAULTS = {*SIGNALS, *CALLS, *DISAGREEMENTS, "exception", "NaN", "skip", "join()"}
# Workers that have no more to say than that another one is gone, or has not come.
GONE = r"rank \d+: .*failed [\d.]+ s after its launch \(timeout|rank \d+: .* failed after [\d.]+ s: not all"
UNLIKE = r"workers are not in the same call: "


@dataclass(frozen=True)
class Case:
    """One run. `at` is the local step before whose `average()` the fault is, or "construction", "flush"
    or "close"; `late_s` after it, where the fault is a signal from outside."""

    seed: int
    workers: int
    backend: str
    algorithm: str
    options: dict[str, Any]
    levels: bool
    flushes: bool
    fault: str
    victim: int
    at: int | str
    late_s: float
    timeout_s: float

    @property
    def steps(self) -> int:
        """The last round is a part of one."""
        return ROUNDS * int(self.options["tau"]) + 1


@dataclass
class Told:
    """What became of a worker.

    `seen` has the checksum of what the algorithm says is equal on all workers, by the number of means
    that this one has merged.
    """

    error: str = ""
    seen: dict[int, int] = field(default_factory=dict)
    mean: int | None = None
    quarantined: int = 0


def draw(seed: int) -> Case:
    """The run of a seed."""
    rng = random.Random(seed)
    workers = rng.choice([2, 2, 3, 3, 4])
    tau = rng.choice([1, 2, 4, 4, 6])
    fault = rng.choice([*sorted(FAULTS), *SIGNALS, "skip"])
    at: int | str = rng.randint(1, ROUNDS * tau)
    if fault in SIGNALS or fault == "exception":
        at = rng.choice(["construction", at, at, "flush", "close"])
    elif fault in DISAGREEMENTS:
        at = "construction"
    # Who waits for a member that has died while it connected waits for two timeouts.
    dies = fault in ("kill", "terminate", "exception")
    waits = fault == "stand still" or (dies and at == "construction")
    levels = workers == 4 and tau % 2 == 0 and tau > 2 and rng.random() < 0.5
    return Case(
        seed=seed,
        workers=workers,
        backend=rng.choice(["gloo", "gloo", "emulated"]),
        algorithm=rng.choice(list(ALGORITHMS)),
        options={
            "tau": tau,
            "fragments": rng.randint(1, min(tau, 3)),
            "codec": rng.choice([None, None, "int8", "int8+ef", "2bit+ef"]),
        },
        levels=levels,
        flushes=rng.random() < 0.7,
        fault=fault,
        victim=rng.randrange(workers),
        at=at,
        late_s=rng.choice([0.0, rng.uniform(0, 0.03)]),
        timeout_s=SHORT_S if waits else LONG_S,
    )


# ---- in a worker ------------------------------------------------------------------------------------


def work(rank: int, case: Case) -> tuple[Told, Told]:
    """The run without its fault, and with it."""
    groups = None
    if case.levels:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        groups = {2: pairs[rank // 2]}
    # Where nothing is wrong a timeout bounds what hangs, and a busy machine is none.
    right = attempt(rank, replace(case, timeout_s=LONG_S), groups, faulty=False)
    dist.barrier()
    return right, attempt(rank, case, groups, faulty=rank == case.victim)


def attempt(rank: int, case: Case, groups: Any, *, faulty: bool) -> Told:
    """Train; whatever is told to the user ends it."""
    told = Told()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _Worker(rank, case, faulty).train(groups, told)
    except (CommunicationError, ValueError, _Deliberate) as error:
        told.error = f"{type(error).__name__}: {error}"
    return told


@dataclass(frozen=True)
class _Worker:
    rank: int
    case: Case
    faulty: bool

    def is_struck(self, at: int | str, *faults: str) -> bool:
        """Whether the fault is here and now, and one of these, if some are given."""
        here = self.faulty and self.case.at == at
        return here and (not faults or self.case.fault in faults)

    def train(self, groups: Any, told: Told) -> None:
        """The user's script."""
        params, optimizer = self.make(groups)
        with _looked_at(optimizer, params, told):
            for step in range(1, self.case.steps + 1):
                self.step(step, params, optimizer)
                _look(optimizer, told)
            self.end(params, optimizer, told)

    def make(self, groups: Any) -> tuple[list[torch.nn.Parameter], AveragingOptimizer]:
        case = self.case
        options = {**case.options, "levels": groups, "timeout_s": case.timeout_s}
        shapes = coded.START
        if self.is_struck("construction", "another tau"):
            options["tau"] = 12
        elif self.is_struck("construction", "no tau"):
            options["tau"] = 0
        elif self.is_struck("construction", "another shape"):
            shapes = [*coded.START[:2], torch.zeros(2)]
        elif self.is_struck("construction"):
            _strike(case)
        params = [torch.nn.Parameter(p.clone()) for p in shapes]
        return params, ALGORITHMS[case.algorithm](params, lr=0.05, **options)

    def step(
        self, step: int, params: list[torch.nn.Parameter], optimizer: AveragingOptimizer
    ) -> None:
        for p, g in zip(params, coded.gradient(self.rank, list(params)), strict=True):
            p.grad = g.detach()
        if self.is_struck(step, "NaN"):
            params[0].grad = torch.full_like(params[0], float("nan"))
        optimizer.step()
        if self.is_struck(step, "skip"):
            return
        if self.is_struck(step):
            _strike(self.case, optimizer)
        optimizer.average()

    def end(
        self, params: list[torch.nn.Parameter], optimizer: AveragingOptimizer, told: Told
    ) -> None:
        if self.is_struck("flush"):
            _strike(self.case)
        if self.case.flushes:
            optimizer.flush()
            _look(optimizer, told)
            with optimizer.averaged():
                told.mean = checksum(list(params))
        if self.is_struck("close"):
            _strike(self.case)
        optimizer.close()


class _Deliberate(Exception):
    """In the user's loop."""


def _strike(case: Case, optimizer: AveragingOptimizer | None = None) -> None:
    """The fault, in the worker that it meets."""
    if case.fault == "exception":
        raise _Deliberate
    if case.fault in CALLS:
        CALLS[case.fault](optimizer)
    if case.fault == "join()" and optimizer is not None:
        with optimizer.join():
            pass
    if case.fault not in SIGNALS:
        return
    me = os.getpid()
    orders = [f"sleep {case.late_s:.3f}", f"kill -{SIGNALS[case.fault]:d} {me}"]
    if SIGNALS[case.fault] == signal.SIGSTOP:
        asleep_s = STOP_S if case.fault == "pause" else case.timeout_s + 3
        orders += [f"sleep {asleep_s}", f"kill -CONT {me}"]
    # Not our child, whose end nobody would wait for.
    subprocess.run(["sh", "-c", f"({'; '.join(orders)}) >/dev/null 2>&1 &"], check=True)
    if not case.late_s:
        time.sleep(0.1)


@contextlib.contextmanager
def _looked_at(
    optimizer: AveragingOptimizer, params: list[torch.nn.Parameter], told: Told
) -> Iterator[None]:
    """After an error nothing is lost, and nothing waits any more."""
    try:
        yield
    except CommunicationError:
        _look(optimizer, told)
        assert all(bool(p.isfinite().all()) for p in params)
        start = time.perf_counter()
        optimizer.state_dict()
        with pytest.raises(CommunicationError):
            optimizer.average()
        optimizer.close()
        assert time.perf_counter() - start < 5, "closing has waited"
        raise
    finally:
        told.quarantined = int(optimizer.stats()["quarantined"])


def _look(optimizer: AveragingOptimizer, told: Told) -> None:
    told.seen[int(optimizer.stats()["syncs"])] = checksum(inspect(optimizer).shared())


# ---- the verdict ------------------------------------------------------------------------------------


def replay(seed: int) -> None:
    """Run the case of a seed.

    Raises:
        AssertionError: something does not hold; with the case, and what every worker was told.
    """
    case = draw(seed)
    dies = case.fault in ("kill", "terminate")
    results: Any = ""
    try:
        results = run(
            work,
            case.workers,
            case,
            backend=case.backend,
            timeout_s=4 * SHORT_S + SLACK_S,
            expect_exit={case.victim: -SIGNALS[case.fault]} if dies else None,
        )
        _judge(case, {rank: result for rank, result in enumerate(results) if result is not None})
    except (AssertionError, WorkerFailure) as error:
        said = "\n".join(map(str, results))
        raise AssertionError(f"replay({seed}): {error}\n{case}\n{said}") from error


def _judge(case: Case, results: dict[int, tuple[Told, Told]]) -> None:
    for rank, (right, told) in results.items():
        assert not right.error, "without a fault"
        # These change what is averaged, alike on all, before they are noticed.
        if case.fault not in ("NaN", "skip", "join()"):
            wrong = [n for n, seen in told.seen.items() if right.seen.get(n, seen) != seen]
            assert not wrong, f"rank {rank} has another anchor after {wrong} means"
        _judge_error(case, rank, right, told)
    alike = [told for _, told in results.values()]
    for n in {n for told in alike for n in told.seen}:
        assert len({told.seen[n] for told in alike if n in told.seen}) == 1, (
            f"anchors after {n} means"
        )
    assert len({told.mean for told in alike if told.mean is not None}) <= 1, "the workers' mean"


def _judge_error(case: Case, rank: int, right: Told, told: Told) -> None:
    fault = case.fault
    error = told.error
    # Whoever has all that it would have without the fault may be told nothing.
    complete = not error and told.seen.keys() >= right.seen.keys()
    if fault in ("pause", "NaN"):
        assert not error, "nothing was wrong"
        assert (told.quarantined > 0) == (fault == "NaN" and rank == case.victim)
    elif fault == "exception" and rank == case.victim:
        assert error.startswith("_Deliberate")
    elif fault in DISAGREEMENTS:
        assert re.search(DISAGREEMENTS[fault], error), error
    elif fault in CALLS or fault in ("skip", "join()"):
        where = UNLIKE + (rf".*rank {case.victim} in {re.escape(fault)}" if fault in CALLS else "")
        if not case.levels:
            assert re.search(where, error), error
        else:
            # Who is in no group with the victim may end before it meets it.
            assert complete or re.search(where, error), error
    else:
        assert complete or re.search(GONE, error), error
