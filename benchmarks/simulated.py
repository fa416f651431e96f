"""Are the simulator's clock and the planner right? Real runs over emulated links beside what was
predicted.

Two workers on one core each; a local step is a loop of small matrix products that lasts a set time
(a third of it in the forward pass, two thirds in the backward pass), so that the machine's speed
does not matter, only its punctuality. The payload is real. The predictions are made from the step
as measured without communication.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

import distoptim
from benchmarks.report import Report, json_path, save
from distoptim.comm import Link, ProcessGroupCommunicator, emulate
from distoptim.planning.planner import Job, plan
from distoptim.simulator import Cluster, Constant, Ring

STEP_S = 0.03
NUMEL = 50_000
WORKERS = 2
ROUNDS = 4
CALIBRATION = 40
CLOCK_SETTINGS = [
    (name, tau, share)
    for name in ("local-sgd", "bmuf", "cocod-sgd", "overlap-local-sgd")
    for tau, share in ((1, 0.5), (2, 0.8), (2, 3.0), (4, 6.0))
]
OFFERED = ("overlap-local-sgd", "local-sgd", "cocod-sgd")
TAUS = (1, 2, 4, 8)
LINKS = [
    Link(latency_s, gbit_s)
    for latency_s in (0.0005, 0.004, 0.012, 0.03, 0.06)
    for gbit_s in (0.02, 1.0)
]


class Step(torch.autograd.Function):
    """Computes for STEP_S in all and gives a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        compute(STEP_S / 3)
        ctx.numel = x.numel()
        return x.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        compute(STEP_S * 2 / 3)
        return grad.expand(ctx.numel)


class Spinning(nn.Module):
    """A model of one parameter tensor whose passes take the set time."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(NUMEL))

    def forward(self) -> Tensor:
        return Step.apply(self.x)


def compute(seconds: float) -> None:
    """Keep the processor busy for so long."""
    a = torch.ones(32, 32)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.mm(a, a)


def all_reduce_link(share: float) -> Link:
    """A link on which a mean of the model takes `share` steps, half of it latency."""
    seconds = share * STEP_S
    return Link(seconds / 4, NUMEL * 4 * 8 / (seconds / 2) / 1e9)


def real(
    method: str, tau: int, link: Link, communicator: ProcessGroupCommunicator
) -> tuple[float, float]:
    """Seconds per step, and of them exposed, by the optimizer's counters."""
    emulate(latency_s=link.latency_s, bandwidth_gbit_s=link.bandwidth_gbit_s)
    model: nn.Module = Spinning()
    if method == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.0)
    else:
        optimizer = distoptim.ALGORITHMS[method](
            model.parameters(), lr=0.0, tau=tau, communicator=communicator
        )
    rounds = max(ROUNDS, math.ceil(16 / tau))
    stamps = []
    exposed = 0.0
    for step in range((rounds + 2) * tau):
        if step % tau == 0:
            stamps.append(time.perf_counter())
            if step == 2 * tau and method != "ddp":
                exposed = optimizer.stats()["exposed_s"]
        model().backward()
        optimizer.step()
        if method != "ddp":
            optimizer.average()
    stamps.append(time.perf_counter())
    seconds = (stamps[-1] - stamps[2]) / (rounds * tau)
    if method == "ddp":
        return seconds, math.nan
    exposed = (optimizer.stats()["exposed_s"] - exposed) / (rounds * tau)
    optimizer.state_dict()  # waits for what is in flight: the communicator is used again
    return seconds, exposed


def calibrate() -> float:
    """Median seconds of a local step without communication; of the slower worker."""
    model = Spinning()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seconds = []
    for _ in range(CALIBRATION):
        start = time.perf_counter()
        model().backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    slowest = torch.tensor([statistics.median(seconds)])
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()


def predicted_exposed_s(method: str, tau: int, link: Link, step_s: float) -> float:
    """Exposed seconds per step, by the simulator, after the first two rounds as in `real`."""
    cluster = Cluster(
        workers=WORKERS,
        model=lambda: nn.Linear(NUMEL, 1, bias=False),
        compute=Constant(step_s),
        network=Ring([link]),
        threads=1,
        optimizer=lambda params, communicator: distoptim.ALGORITHMS[method](
            params, lr=0.0, tau=tau, communicator=communicator
        ),
    )
    cluster.advance(2 * tau)
    before = cluster.stats()["exposed_s"]
    cluster.advance(ROUNDS * tau)
    return float(cluster.stats()["exposed_s"] - before) / (ROUNDS * tau)


def worker(rank: int, store: str, results: Any) -> None:
    """Run every setting; rank 0 reports."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {rank % (os.cpu_count() or 1)})
    dist.init_process_group(
        emulate(latency_s=0.0, bandwidth_gbit_s=100.0),
        init_method=f"file://{store}",
        rank=rank,
        world_size=WORKERS,
    )
    communicator = ProcessGroupCommunicator()
    found: dict[Any, Any] = {"step_s": calibrate()}
    for name, tau, share in CLOCK_SETTINGS:
        found[name, tau, share] = real(name, tau, all_reduce_link(share), communicator)
    for i, link in enumerate(LINKS):
        for name, tau in [("ddp", 1), *((name, tau) for name in OFFERED for tau in TAUS)]:
            found[i, name, tau] = real(name, tau, link, communicator)
    if rank == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


def run_workers(target: Callable[..., None]) -> dict[Any, Any]:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with TemporaryDirectory() as folder:
        started = torch.multiprocessing.spawn(
            target, args=(str(Path(folder, "store")), results), nprocs=WORKERS, join=False
        )
        found: dict[Any, Any] = results.get()
        while not started.join():
            pass
    return found


def report_clock(report: Report, found: dict[Any, Any]) -> None:
    """Exposed milliseconds per step, real and predicted."""
    rows = []
    errors = []
    for name, tau, share in CLOCK_SETTINGS:
        exposed = found[name, tau, share][1]
        predicted = predicted_exposed_s(name, tau, all_reduce_link(share), found["step_s"])
        # Where nothing is exposed there is nothing to divide by: then in % of the step.
        error = abs(exposed - predicted) / (predicted or STEP_S) * 100
        errors.append(error)
        rows.append(
            {
                "method": name,
                "tau": tau,
                "all-reduce, steps": share,
                "predicted ms": predicted * 1e3,
                "measured ms": exposed * 1e3,
                "differs by %": error,
            }
        )
    report.table("exposed communication per step: the simulator's clock and real runs", rows)
    report.aim(
        f"settings of {len(errors)} that differ by more than 5 %", sum(e > 5 for e in errors), 0
    )
    report.aim("median difference", statistics.median(errors), 5, " %")


def report_plan(report: Report, found: dict[Any, Any]) -> None:
    """The recommended setting beside the fastest one measured."""
    rows = []
    for i, link in enumerate(LINKS):
        made = plan(
            Job(found["step_s"], NUMEL, WORKERS, Ring([link])), algorithms=OFFERED, taus=TAUS
        )
        measured = {
            key[1:]: value[0]
            for key, value in found.items()
            if isinstance(key, tuple) and key[0] == i
        }
        fastest = min(measured, key=lambda key: measured[key])
        mine = measured[made.best.algorithm, made.best.tau]
        rows.append(
            {
                "latency ms": link.latency_s * 1e3,
                "Gbit/s": link.bandwidth_gbit_s,
                "recommended": f"{made.best.algorithm} tau {made.best.tau}",
                "predicted ms": made.best.step_s * 1e3,
                "measured ms": mine * 1e3,
                "fastest": f"{fastest[0]} tau {fastest[1]}",
                "its ms": measured[fastest] * 1e3,
                "slower by %": (mine / measured[fastest] - 1) * 100,
            }
        )
    report.table("the plan's choice on ten links", rows)
    report.aim(
        "worst choice is slower than the fastest by",
        max(row["slower by %"] for row in rows),
        10,
        " %",
    )


def main() -> Report:
    """Measure and print."""
    report = Report(
        f"predictions beside real runs: {WORKERS} workers, a step of {STEP_S * 1e3:g} ms"
    )
    found = run_workers(worker)
    report_clock(report, found)
    report_plan(report, found)
    report.finish()
    return report


if __name__ == "__main__":
    save_to = json_path(__doc__)
    save([main()], save_to)
