"""What streams are worth: means of several sizes over links of several round trips, on 1, 2, 4 and 8
streams and on as many as "auto" takes. Linux, root: over `benchmarks.delay_line`.

Run: python -m benchmarks.streams [--workers 2,4] [--rtt-ms 1,20,100] [--mb 4,100] [--gbit-s 1]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from benchmarks.delay_line import DelayLine
from distoptim.comm import ProcessGroupCommunicator

STREAMS: tuple[int | str, ...] = (1, 2, 4, 8, "auto")
REPEATS = 3


def worker(mb: float) -> None:
    """Rank 0 prints one line of JSON for each number of streams: the fastest mean, since what other
    programs take of the processor only adds to it."""
    dist.init_process_group("gloo")
    buffer = torch.ones(int(mb * 1e6 / 4))
    everybody = torch.zeros(1)
    for streams in STREAMS:
        communicator = ProcessGroupCommunicator(streams=streams)
        communicator.broadcast(buffer)
        communicator.prepare(buffer.nbytes)
        communicator.all_reduce(buffer).wait(600.0)
        seconds = []
        cpu = time.process_time()
        for _ in range(REPEATS):
            dist.all_reduce(everybody)
            start = time.perf_counter()
            communicator.all_reduce(buffer).wait(600.0)
            seconds.append(time.perf_counter() - start)
        cpu = time.process_time() - cpu
        link = communicator.link
        assert link is not None
        if dist.get_rank() == 0:
            found = {
                "streams": streams,
                "taken": communicator.streams,
                "seconds": min(seconds),
                "cpu_ms_mb": 1e3 * cpu / REPEATS / mb,
                "rtt_ms": 1e3 * link.latency_s,
                "gbit_s": link.bandwidth_gbit_s,
            }
            print(json.dumps(found), flush=True)
        communicator.close()
    dist.destroy_process_group()


def cell(workers: int, rtt_ms: float, mb: float, gbit_s: float) -> None:
    """One row of the table for each number of streams."""
    with DelayLine(workers, rtt_s=rtt_ms / 1e3, gbit_s=gbit_s) as line:
        command = [sys.executable, "-m", "benchmarks.streams", "--worker", str(mb)]
        first, *others = line.start(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        out, _ = first.communicate()
        for process in others:
            process.communicate()
    bound = " (bound by the processor)" if workers > (os.cpu_count() or 1) else ""
    for text in out.splitlines():
        found = json.loads(text)
        sent = 2 * (workers - 1) / workers * mb * 8 / 1e3
        taken = "" if found["streams"] != "auto" else f" ({found['taken']})"
        print(
            f"| {workers}{bound} | {rtt_ms:g} | {mb:g} | {found['streams']}{taken} | {found['seconds']:.3f} | "
            f"{sent / found['seconds'] / gbit_s:.2f} | {found['cpu_ms_mb']:.1f} | {found['rtt_ms']:.1f} ms, "
            f"{found['gbit_s']:.2f} Gbit/s | {os.getloadavg()[0]:.1f} |",
            flush=True,
        )


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", default="2,4")
    parser.add_argument("--rtt-ms", default="1,20,100")
    parser.add_argument("--mb", default="4,100")
    parser.add_argument("--gbit-s", type=float, default=1.0)
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker)
        return
    print(
        "| workers | RTT, ms | MB | streams | seconds | share of the link | CPU, ms/MB | measured | load |"
    )
    print("|---" * 9 + "|")
    axes = [[float(x) for x in text.split(",")] for text in (given.workers, given.rtt_ms, given.mb)]
    for workers, rtt_ms, mb in itertools.product(*axes):
        cell(int(workers), rtt_ms, mb, given.gbit_s)


if __name__ == "__main__":
    main()
