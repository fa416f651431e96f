"""How much communication is hidden: two workers, one core each, over an emulated link.

The link is set, from the computation measured just before, so that one all-reduce takes a given
share of a round of tau local steps. Segments of each method lie between segments of computation
alone, so that the machine's noise hits all alike. What is exposed is measured three times,
independently, in % of computation:

- stats: by `optimizer.stats()`;
- clock: by the clock in the training loop, a round less the same steps without communication. It
  also holds the merging, and the processor time that gloo and the emulation take from the training;
- asleep: by the kernel's account of the training thread, the time in which it neither ran nor
  queued for a core, which other programs on the machine do not change (Linux only).
"""

from __future__ import annotations

import math
import multiprocessing
import os
import socket
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

import distoptim
from benchmarks.report import Report, json_path, save
from distoptim.comm import Communicator, Link, ProcessGroupCommunicator, emulate

WORKERS = 2
TAU = 8
LIMITS = {
    0.5: 1.0,
    0.9: 3.0,
}  # an all-reduce as a share of tau steps -> what may be exposed, % of computation
LATENCY_S = 1e-3
BATCH = 5120
WIDTH = 160
DEPTH = 4
REPETITIONS = 5
ROUNDS = {"overlap-local-sgd": 3, "cocod-sgd": 3, "local-sgd": 2, "ddp": 2, "computation": 3}
STEPS = {"ddp": 2}  # in a round; the others have TAU
BLOCKING = ("local-sgd", "ddp")
SCHEDULER = Path("/proc/thread-self/schedstat")

Figures = dict[str, float]


def model() -> nn.Module:
    """0.1M parameters.

    Little for the processor to send, beside the computation of a large batch.
    """
    torch.manual_seed(0)
    return nn.Sequential(
        *(layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU()))
    )


def model_bytes() -> int:
    return sum(p.numel() * 4 for p in model().parameters())


@dataclass
class Trainee:
    """A model in training by one method.

    `stats` are the optimizer's own measurements, if it makes any.
    """

    name: str
    step: Callable[[], None]
    stats: Callable[[], Figures]


def trainee(method: str, data: torch.Tensor, communicator: Communicator) -> Trainee:
    """A model with its optimizer; "computation" is the local steps without any communication."""
    net = model()
    if method == "ddp":
        net = nn.parallel.DistributedDataParallel(net, bucket_cap_mb=1000)
    make = distoptim.ALGORITHMS.get(method)
    averaging = (
        make(net.parameters(), lr=0.01, tau=TAU, communicator=communicator)
        if make is not None
        else None
    )
    optimizer = averaging or torch.optim.SGD(net.parameters(), lr=0.01)

    def step() -> None:
        net(data).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if averaging is not None:
            averaging.average()

    return Trainee(method, step, averaging.stats if averaging is not None else dict)


def clocks() -> Figures:
    """Now, in seconds: of this thread asleep, of the processor in this process's other threads."""
    now = time.perf_counter()
    ran_or_queued = (
        sum(map(int, SCHEDULER.read_text().split()[:2])) / 1e9 if SCHEDULER.exists() else math.nan
    )
    return {"asleep": now - ran_or_queued, "others": time.process_time() - time.thread_time()}


def segment(subject: Trainee, rounds: int | None = None) -> Figures:
    """What a round takes, by `clocks` and `stats`: medians over rounds, the first of which is left
    out.

    By the clock it is the sum over its steps of a step's median, which loses fewer rounds to other
    programs.
    """
    gains: dict[str, list[float]] = defaultdict(list)
    steps: list[list[float]] = []
    dist.barrier()
    for number in range(1 + (ROUNDS[subject.name] if rounds is None else rounds)):
        before = clocks() | subject.stats()
        ends = [time.perf_counter()]
        for _ in range(STEPS.get(subject.name, TAU)):
            subject.step()
            ends.append(time.perf_counter())
        after = clocks() | subject.stats()
        if number:
            steps.append([b - a for a, b in pairwise(ends)])
            for key in after:
                gains[key].append(after[key] - before[key])
    figures = {key: statistics.median(values) for key, values in gains.items()}
    return figures | {"clock": sum(map(statistics.median, zip(*steps, strict=True)))}


def repetition(trainees: dict[str, Trainee], share: float) -> dict[str, Figures]:
    """One segment of each method, as shares of computation."""
    before = segment(trainees["computation"])
    # All workers set the same link: for the slowest of them.
    slowest = torch.tensor(before["clock"])
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    link = Link(LATENCY_S, model_bytes() * 8e-9 / (share * slowest.item() - 2 * LATENCY_S))
    emulate(latency_s=link.latency_s, bandwidth_gbit_s=link.bandwidth_gbit_s)
    out = {}
    for method in methods():
        measured = segment(trainees[method])
        after = segment(trainees["computation"])
        step = {key: (before[key] + after[key]) / 2 / TAU for key in after}
        out[method] = shares(method, measured, step, link.all_reduce_s(model_bytes(), WORKERS))
        before = after
    return out


def methods() -> list[str]:
    return [method for method in ROUNDS if method != "computation"]


def shares(method: str, measured: Figures, step: Figures, all_reduce_s: float) -> Figures:
    """What was measured in a round, as shares of its computation.

    `step` is a step of computation alone.
    """
    steps = STEPS.get(method, TAU)
    computation = step["clock"] * steps
    all_reduces = steps if method == "ddp" else 1
    return {
        "step_s": step["clock"],
        "all_reduce_s": all_reduce_s,
        "predicted": all_reduces * all_reduce_s / computation if method in BLOCKING else 0.0,
        "stats": measured["exposed_s"] / measured["computation_s"]
        if "exposed_s" in measured
        else math.nan,
        "clock": measured["clock"] / computation - 1,
        "asleep": measured["asleep"] / computation,
        "merging": measured.get("overhead_s", math.nan) / computation,
        "others": (measured["others"] - step["others"] * steps) / computation,
    }


def worker(rank: int, port: int, results: Any) -> None:
    """One worker process; rank 0 hands over everybody's figures."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        emulate(latency_s=0.0, bandwidth_gbit_s=1e3),
        rank=rank,
        world_size=WORKERS,
        init_method=f"tcp://127.0.0.1:{port}",
    )
    data = torch.randn(BATCH, WIDTH)
    # One for all, since the threads of every gloo group look for work a hundred times a second.
    communicator = ProcessGroupCommunicator()
    trainees = {method: trainee(method, data, communicator) for method in ROUNDS}
    for subject in trainees.values():
        segment(subject, rounds=1)
    figures = {share: [repetition(trainees, share) for _ in range(REPETITIONS)] for share in LIMITS}
    everybody: list[Any] = [None] * WORKERS
    dist.all_gather_object(everybody, figures)
    if rank == 0:
        results.put(everybody)
    dist.barrier()
    dist.destroy_process_group()


def measure() -> dict[float, list[dict[str, Figures]]]:
    """Share -> for each worker and repetition, method -> figures."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    results = multiprocessing.get_context("spawn").SimpleQueue()
    context = torch.multiprocessing.spawn(worker, (port, results), nprocs=WORKERS, join=False)
    # Read before the workers have ended, which they do only when the pipe has room; join raises if
    # one failed.
    while results.empty() and not context.join(timeout=0.2):
        pass
    everybody = results.get()
    context.join()
    return {share: [r for figures in everybody for r in figures[share]] for share in LIMITS}


def median(figures: list[dict[str, Figures]], method: str, key: str) -> tuple[float, float]:
    """Median and its error: the range between the quartiles over the root of the number."""
    values = [f[method][key] for f in figures]
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return middle, (high - low) / math.sqrt(len(values))


def table(report: Report, share: float, figures: list[dict[str, Figures]]) -> None:
    rows = []
    for method in methods():
        row: dict[str, Any] = {"method": method}
        for key in ("step_s", "all_reduce_s"):
            row[key.replace("_s", " ms").replace("_", "-")] = median(figures, method, key)[0] * 1e3
        for key in ("predicted", "stats", "clock", "asleep", "merging", "others"):
            value, error = (100 * x for x in median(figures, method, key))
            row[key] = None if math.isnan(value) else value
            if key == "clock":
                row["+-"] = error
            if key in ("stats", "clock", "asleep") and not math.isnan(value):
                judge(
                    report,
                    f"{method}, all-reduce {share} of a round, {key}",
                    method,
                    (value, error),
                    share,
                    median(figures, method, "predicted")[0] * 100,
                )
        rows.append(row)
    report.table(
        f"all-reduce {share} of a round of {TAU} steps; in % of computation: exposed as predicted, by three "
        "measures; merging; processor time of gloo and the emulation",
        rows,
    )


def judge(
    report: Report,
    name: str,
    method: str,
    figure: tuple[float, float],
    share: float,
    predicted: float,
) -> None:
    """Hidden means near nothing; blocking means what the link costs."""
    value, error = figure
    if method in BLOCKING:
        report.aim(
            f"{name}: off the prediction",
            abs(value / predicted - 1) * 100,
            10.0,
            " %",
            error / predicted * 100,
        )
    else:
        report.aim(f"{name}: exposed", value, LIMITS[share], " %", error)


def main() -> Report:
    report = Report(f"exposed communication: {WORKERS} workers, one core each, tau = {TAU}")
    if (os.cpu_count() or 1) < WORKERS:
        report.note("fewer cores than workers: the figures by the clock mean nothing here")
    for share, figures in measure().items():
        table(report, share, figures)
    report.finish()
    return report


if __name__ == "__main__":
    target = json_path(__doc__)
    save([main()], target)
