"""What do coding and decoding cost? Time of 11.2M floats as a multiple of one copy of that tensor, and
of the 1-bit codec's; and all the coding of one worker's round of a small model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.report import Report, json_path, save
from distoptim.comm import FinishedHandle, Handle, SingleWorker
from distoptim.comm.codecs import CODECS, find
from distoptim.comm.compressed import CompressedMean

NUMEL = 11_200_000
SMALL = 820_000
REPEATS = 9
LIMITS = {"bf16": 3.0, "int8": 3.0, "top64": 25.0}


def seconds(fn: Callable[[], object], clock: Callable[[], float]) -> float:
    """The least of some calls, after one that is not counted."""
    fn()
    times = []
    for _ in range(REPEATS):
        start = clock()
        fn()
        times.append(clock() - start)
    return min(times)


def measure(threads: int) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of a copy, and the codecs' times as multiples of it.

    Of one thread in its processor's time.
    """
    torch.set_num_threads(threads)
    timed = partial(seconds, clock=time.thread_time if threads == 1 else time.perf_counter)
    x = torch.randn(NUMEL)
    out = torch.zeros(NUMEL)
    copy_s = timed(lambda: out.copy_(x))
    rows: list[dict[str, Any]] = []
    for name, codec in CODECS.items():
        code = torch.zeros(codec.nbytes(NUMEL), dtype=torch.uint8)
        size = len(code) / NUMEL
        # A copy moves 8 bytes a number; coding reads 4 and writes the code, decoding reads it and 4
        # and writes 4.
        rows.append(
            {
                "codec": name,
                "bytes per float": size,
                "coding": timed(partial(codec.encode, x, code)) / copy_s,
                "its memory": (4 + size) / 8,
                "decoding": timed(partial(codec.add_decoded, code, out)) / copy_s,
                "its memory ": (8 + size) / 8,
            }
        )
    return copy_s, rows


class Echo(SingleWorker):
    """Four workers that all send what this one does, at once."""

    size = 4

    def all_gather(
        self, output: torch.Tensor, input: torch.Tensor, *, after: Handle | None = None
    ) -> Handle:
        return FinishedHandle(output.copy_(input))


def rounds() -> list[dict[str, Any]]:
    """Milliseconds that one thread codes in a round, codec by codec."""
    torch.set_num_threads(1)
    timed = partial(seconds, clock=time.thread_time)
    buffer = torch.randn(SMALL + 1)
    rows = []
    for name in (name + ef for name in CODECS for ef in ("", "+ef")):
        coding = find(name)
        assert coding is not None
        mean = CompressedMean(coding, Echo(), numel=SMALL, extra=1, start=torch.zeros(SMALL))

        def code(mean: CompressedMean = mean) -> None:
            buffer[-1] = 1.0
            handle = mean.start(buffer)
            handle.poll()
            handle.wait(1.0)
            mean.merging(buffer)

        rows.append({"codec": name, "ms": 1e3 * timed(code)})
    return rows


def main() -> Report:
    """Measure and print."""
    report = Report("the cost of codecs")
    kept = torch.get_num_threads()
    copy_s, rows = measure(1)
    report.note(
        f"one copy of {NUMEL:,} floats: {copy_s * 1e3:.1f} ms of one thread's processor time"
    )
    report.table(
        "coding, and decoding and adding, in copies, beside the memory they must move; one thread",
        rows,
    )
    for row in rows:
        for what in ("coding", "decoding"):
            report.aim(
                f"{what} {row['codec']}", row[what], LIMITS.get(str(row["codec"]), 5.0), " copies"
            )
    both = {str(row["codec"]): row["coding"] + row["decoding"] for row in rows}
    report.aim("coding and decoding 1bit", both["1bit"], 3.0, " copies")
    for name in ("2bit", "e3m0"):
        report.aim(f"coding and decoding {name}", both[name] / both["1bit"], 2.0, " times 1bit")
    report.table(f"a worker's coding in a round of {SMALL:,} floats among 4 workers", rounds())
    threads = os.cpu_count() or 1
    copy_s, rows = measure(threads)
    report.note(f"with {threads} threads a copy takes {copy_s * 1e3:.1f} ms")
    report.table(f"the same with {threads} threads, by the clock on the wall", rows)
    torch.set_num_threads(kept)
    report.finish()
    return report


if __name__ == "__main__":
    target = json_path(__doc__)
    save([main()], target)
