"""What does simulating cost? Overhead over the bare gradients, and time and memory against the number of workers."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import torch
from distoptim_experiments.models import registry as models
from torch import Tensor, nn

import distoptim
from benchmarks.report import Report, json_path, save
from distoptim.comm import Link
from distoptim.simulator import Cluster, Constant, Ring

WORKERS = 16
BATCH = 48
TAU = 4
REPEATS = 8
SCALES = (16, 64, 256, 1024)


def loss(model: nn.Module, rank: int) -> Tensor:
    """The demo's model on a batch of noise of the demo's shape."""
    return nn.functional.cross_entropy(
        model(torch.ones(BATCH, 1, 8, 8)), torch.zeros(BATCH, dtype=torch.long)
    )


def cluster(workers: int, model: type | None = None) -> Cluster:
    """Overlap-Local-SGD on virtual workers."""
    return Cluster(
        workers=workers,
        threads=1,
        compute=Constant(0.03),
        network=Ring([Link(0.003, 0.5)]),
        model=lambda: models.build("cnn", (1, 8, 8), 10) if model is None else model(32, 32),
        optimizer=lambda params, communicator: distoptim.OverlapLocalSGD(
            params, lr=0.01, momentum=0.9, tau=TAU, communicator=communicator
        ),
    )


def bare_s(simulated: Cluster) -> float:
    """Seconds of tau steps of all workers.

    Gradients and local optimizers, without engine and clock.
    """
    start = time.perf_counter()
    for _ in range(TAU):
        for rank, (model, optimizer) in enumerate(
            zip(simulated.models, simulated.optimizers, strict=True)
        ):
            loss(model, rank).backward()
            optimizer.inner.step()
            optimizer.zero_grad()
    return time.perf_counter() - start


def round_s(simulated: Cluster) -> float:
    """Seconds of tau steps of the cluster."""
    start = time.perf_counter()
    for _ in range(TAU):
        simulated.step(loss)
    return time.perf_counter() - start


def memory_mb() -> float:
    """Resident memory of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> Report:
    """Measure and print."""
    torch.set_num_threads(1)
    report = Report("the cost of simulating")
    simulated = cluster(WORKERS)
    pairs = [(bare_s(simulated), round_s(simulated)) for _ in range(REPEATS)][1:]
    overhead = (statistics.median(whole / bare for bare, whole in pairs) - 1) * 100
    report.note(
        f"{WORKERS} workers of the demo's model: {pairs[-1][0] * 1e3:.0f} ms of gradients in {TAU} steps"
    )
    report.aim(f"overhead over the bare gradients, {WORKERS} workers", overhead, 30, " %")
    rows = []
    for m in SCALES:
        before = memory_mb()
        many = cluster(m, nn.Linear)
        for _ in range(TAU):
            many.step(lambda model, rank: model(torch.ones(4, 32)).square().mean())
        start = time.perf_counter()
        for _ in range(2 * TAU):
            many.step(lambda model, rank: model(torch.ones(4, 32)).square().mean())
        rows.append(
            {
                "workers": m,
                "ms per step": (time.perf_counter() - start) / (2 * TAU) * 1e3,
                "us per step and worker": (time.perf_counter() - start) / (2 * TAU * m) * 1e6,
                "MB": memory_mb() - before,
                "KB per worker": (memory_mb() - before) / m * 1e3,
            }
        )
        del many
    report.table(
        "a model of 1,056 parameters, Overlap-Local-SGD: time and memory against the number of workers",
        rows,
    )
    report.aim(
        "time per worker, 1,024 workers over 64",
        rows[-1]["us per step and worker"] / rows[1]["us per step and worker"],
        1.5,
        " x",
    )
    report.finish()
    return report


if __name__ == "__main__":
    target = json_path(__doc__)
    save([main()], target)
