"""How long until training begins, and what the first launch costs: beside torch's DDP, over links of
several round trips. Linux, root: over `benchmarks.delay_line`.

Run: python -m benchmarks.starting [--rtt-ms 1,20,50] [--mb 4] [--mbit-s 1000]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
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
REPEATS = 3


class Model(nn.Module):
    """So many megabytes of parameters."""

    def __init__(self, mb: float) -> None:
        super().__init__()
        numel = int(mb * 1e6 / 4 / PIECES)
        self.x = nn.ParameterList([torch.zeros(numel) for _ in range(PIECES)])


def seconds(make: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and how long that took, begun by all together."""
    dist.barrier()
    start = time.perf_counter()
    made = make()
    return made, time.perf_counter() - start


def launches(optimizer: distoptim.OverlapLocalSGD, pause_s: float) -> list[float]:
    """Seconds of each `average()` that launches a mean for which none waits: it is over by the next."""
    found = []
    for step in range(1, TAU * ROUNDS + 1):
        time.sleep(pause_s / TAU)
        start = time.perf_counter()
        optimizer.average()
        if step % TAU == 0:
            found.append(time.perf_counter() - start)
    return found


def worker(mb: float, rtt_s: float) -> None:
    """Rank 0 prints a line of JSON."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    # What torch imports at the first optimizer is no part of it.
    torch.optim.SGD(Model(mb).parameters(), lr=0.1)
    rows = []
    for _ in range(REPEATS):
        ddp, ddp_s = seconds(lambda: DistributedDataParallel(Model(mb)))
        own, own_s = seconds(
            lambda: DistributedDataParallel(Model(mb), process_group=dist.new_group())
        )
        del ddp, own
        optimizer, ours_s = seconds(
            lambda: distoptim.OverlapLocalSGD(Model(mb).parameters(), lr=0.1, tau=TAU)
        )
        first, *others = launches(optimizer, 1.0 + 8 * rtt_s)
        rows.append((ddp_s, own_s, ours_s, first, statistics.median(others)))
        optimizer.close()
    if dist.get_rank() == 0:
        print(json.dumps([statistics.median(column) for column in zip(*rows, strict=True)]))
    dist.destroy_process_group()


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rtt-ms", default="1,20,50")
    parser.add_argument("--mb", type=float, default=4.0)
    parser.add_argument("--mbit-s", type=float, default=1000.0)
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        worker(given.mb, given.worker)
        return
    print(
        "| RTT, ms | DDP, s | DDP with a group of its own | ours | first launch, ms | later | load |"
    )
    print("|---" * 7 + "|")
    for rtt_ms in (float(text) for text in given.rtt_ms.split(",")):
        command = [sys.executable, "-m", "benchmarks.starting", "--mb", str(given.mb)]
        command += ["--worker", str(rtt_ms / 1e3)]
        with DelayLine(2, rtt_s=rtt_ms / 1e3, gbit_s=given.mbit_s / 1e3) as line:
            first, _ = line.start(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            out, _ = first.communicate()
        ddp, own, ours, launch, later = json.loads(out)
        print(
            f"| {rtt_ms:g} | {ddp:.2f} | {own:.2f} | {ours:.2f} | {1e3 * launch:.2f} | "
            f"{1e3 * later:.2f} | {os.getloadavg()[0]:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
