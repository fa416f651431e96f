"""Machines of unequal speed, with real processes: seconds until the workers' mean is right about 95 % of
digits, with one tau, without the slowest worker, and with rounds of equal time.

A local step sleeps until it has taken as long as its machine needs, so that the load of this one matters
little; what is computed and sent is real. In a second table the quickest becomes ten times slower.

Run: python -m benchmarks.unequal [--seeds 5]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from distoptim_experiments.config import RunConfig
from distoptim_experiments.training.problem import Problem

import distoptim
from distoptim.periods import EqualTime
from distoptim.testing import processes

STEP_S = 0.06
SPEEDS = (1.0, 2.0, 3.0, 4.0)
ROUND_S = 0.48
TAU = 20
"""As many local steps as a round of equal time has on the mean of these workers."""

SLOWER_AFTER_S = 2.0
TARGET = 0.95
UNTIL_S = 30.0

VARIANTS: dict[str, tuple[Any, tuple[float, ...]]] = {
    f"tau = {TAU}": (TAU, SPEEDS),
    f"tau = {TAU} without the slowest": (TAU, SPEEDS[1:]),
    f"EqualTime({ROUND_S})": (EqualTime(ROUND_S), SPEEDS),
}


def worker(rank: int, name: str, seed: int, slows: bool) -> tuple[float, int]:
    """Seconds until the target (infinite: not reached), and this worker's local steps in them."""
    tau, speeds = VARIANTS[name]
    # Who is left out does not take its data along.
    problem = Problem(
        RunConfig(data="digits", model="mlp", workers=len(speeds), batch_size=32, seed=seed)
    )
    batches = problem.batches(rank)
    model = problem.model()
    optimizer = distoptim.OverlapLocalSGD(
        model.parameters(), lr=0.02, momentum=0.9, tau=tau, module=model, timeout_s=60.0
    )
    dist.barrier()
    start = time.perf_counter()
    rounds = 0
    while time.perf_counter() - start < 2 * UNTIL_S:
        begun = time.perf_counter()
        images, labels = next(batches)
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        slow = 10 if slows and rank == len(speeds) - 1 and begun - start > SLOWER_AFTER_S else 1
        time.sleep(max(0.0, begun + slow * STEP_S / speeds[rank] - time.perf_counter()))
        optimizer.average()
        if optimizer.rounds == rounds:
            continue
        rounds = optimizer.rounds
        seconds = time.perf_counter() - start
        found = torch.tensor([accuracy(optimizer, model, problem), seconds])
        dist.broadcast(found, 0)
        if found[0] >= TARGET or found[1] > UNTIL_S:
            break
    optimizer.close()
    return (found[1].item() if found[0] >= TARGET else float("inf")), optimizer.local_step


def accuracy(
    optimizer: distoptim.OverlapLocalSGD, model: torch.nn.Module, problem: Problem
) -> float:
    """Of the workers' mean."""
    data = problem.data
    with optimizer.averaged(model), torch.no_grad():
        return float((model(data.test_images).argmax(1) == data.test_labels).float().mean())


def main() -> None:
    """Print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    processes.PRELOAD.append("distoptim_experiments.training.problem")
    for slows in (False, True):
        told = f"the quickest ten times slower after {SLOWER_AFTER_S:g} s" if slows else "steady"
        print(f"\n{told}\n\n| | seconds to {TARGET:.0%}, median (range) | local steps | load |")
        print("|---|---|---|---|")
        for name, (_, speeds) in VARIANTS.items():
            runs = [processes.run(worker, len(speeds), name, seed, slows) for seed in seeds]
            seconds = sorted(run[0][0] for run in runs)
            steps = [
                round(statistics.mean(column))
                for column in zip(*([s for _, s in run] for run in runs), strict=True)
            ]
            print(
                f"| {name} | {statistics.median(seconds):.1f} ({seconds[0]:.1f} to {seconds[-1]:.1f}) | "
                f"{', '.join(map(str, steps))} | {os.getloadavg()[0]:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
