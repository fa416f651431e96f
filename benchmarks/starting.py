"""How long until training begins, and what the first launch costs: beside torch's DDP, over links of
several round trips. Linux, root: over `benchmarks.delay_line`.

Run: python -m benchmarks.starting [--rtt-ms 1,20,50] [--mb 0.04,4] [--mbit-s 1000] [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distoptim
from benchmarks.delay_line import DelayLine

PIECES = 8
TAU = 2
ROUNDS = 5


class Model(nn.Module):
    """So many megabytes of parameters."""

    def __init__(self, mb: float) -> None:
        super().__init__()
        numel = int(mb * 1e6 / 4 / PIECES)
        self.x = nn.ParameterList([torch.zeros(numel) for _ in range(PIECES)])


def ddp(mb: float) -> DistributedDataParallel:
    """Over the group that is there."""
    return DistributedDataParallel(Model(mb))


def ddp_with_a_group(mb: float) -> DistributedDataParallel:
    """Over one of its own, as every optimizer here has."""
    return DistributedDataParallel(Model(mb), process_group=dist.new_group())


def ours(mb: float) -> distoptim.OverlapLocalSGD:
    """Groups, agreement, the link measured, rank 0's parameters."""
    return distoptim.OverlapLocalSGD(Model(mb).parameters(), lr=0.1, tau=TAU)


KINDS: dict[str, Callable[[float], Any]] = {
    "DDP": ddp,
    "DDP with a group of its own": ddp_with_a_group,
    "ours": ours,
}


def launches(optimizer: distoptim.OverlapLocalSGD, pause_s: float) -> list[float]:
    """Clock and processor seconds of the first `average()` that launches a mean, and of the fastest later
    one; none waits for the mean before, which is over by then."""
    found = []
    for step in range(1, TAU * ROUNDS + 1):
        time.sleep(pause_s / TAU)
        start = time.perf_counter(), time.thread_time()
        optimizer.average()
        if step % TAU == 0:
            found.append((time.perf_counter() - start[0], time.thread_time() - start[1]))
    later = [min(column) for column in zip(*found[1:], strict=True)]
    return [*found[0], *later]


def worker(kind: str, mb: float, rtt_s: float) -> None:
    """Rank 0 prints a line of JSON: seconds until it is made, in a program that has just begun."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    # What torch imports at the first optimizer is no part of it.
    torch.optim.SGD(Model(mb).parameters(), lr=0.1)
    dist.barrier()
    start = time.perf_counter()
    made = KINDS[kind](mb)
    seconds = torch.tensor([time.perf_counter() - start])
    # Of the last who is done.
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    found = [seconds.item()]
    if isinstance(made, distoptim.OverlapLocalSGD):
        found += launches(made, 1.0 + 8 * rtt_s)
        made.close()
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measured(line: DelayLine, kind: str, mb: float, rtt_s: float) -> list[float]:
    """What a worker of this kind says."""
    command = [sys.executable, "-m", "benchmarks.starting", "--mb", str(mb)]
    command += ["--rtt-ms", str(1e3 * rtt_s), "--worker", kind]
    first, second = line.start(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    out, _ = first.communicate()
    second.communicate()
    found: list[float] = json.loads(out)
    return found


def row(rtt_s: float, mb: float, gbit_s: float, repeats: int) -> None:
    """One line of the table: the fastest of programs that have just begun, each kind in turn.

    What other programs take of the processor only adds to it.
    """
    with DelayLine(2, rtt_s=rtt_s, gbit_s=gbit_s) as line:
        runs = [{kind: measured(line, kind, mb, rtt_s) for kind in KINDS} for _ in range(repeats)]
    seconds = [min(run[kind][0] for run in runs) for kind in KINDS]
    more = (seconds[-1] - seconds[0]) / rtt_s
    launch = [min(column) for column in zip(*(run["ours"][1:] for run in runs), strict=True)]
    print(
        f"| {mb:g} | {1e3 * rtt_s:g} | {' | '.join(f'{s:.2f}' for s in seconds)} | {more:+.1f} | "
        f"{' | '.join(f'{1e3 * s:.2f}' for s in launch)} | {os.getloadavg()[0]:.1f} |",
        flush=True,
    )


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rtt-ms", default="1,20,50")
    parser.add_argument("--mb", default="0.04,4")
    parser.add_argument("--mbit-s", type=float, default=1000.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", choices=list(KINDS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        worker(given.worker, float(given.mb), float(given.rtt_ms) / 1e3)
        return
    launch = "first launch, ms | its CPU | later ones | CPU"
    print(f"| MB | RTT, ms | {', s | '.join(KINDS)}, s | RTTs more than DDP | {launch} | load |")
    print("|---" * 11 + "|")
    for mb in (float(text) for text in given.mb.split(",")):
        for rtt_ms in (float(text) for text in given.rtt_ms.split(",")):
            row(rtt_ms / 1e3, mb, given.mbit_s / 1e3, given.repeats)


if __name__ == "__main__":
    main()
