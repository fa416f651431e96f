"""What do coding and decoding cost? Time of 11.2M floats as a multiple of one copy of that tensor."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.report import Report, json_path, save
from distoptim.comm.codec import CODECS

NUMEL, REPEATS = 11_200_000, 7


def seconds(fn: Callable[[], object]) -> float:
    """Median of some calls, after one that is not counted."""
    fn()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> Report:
    """Measure and print."""
    torch.set_num_threads(1)
    report = Report("the cost of codecs")
    x, out = torch.randn(NUMEL), torch.zeros(NUMEL)
    copy_s = seconds(lambda: out.copy_(x))
    report.note(f"one copy of {NUMEL:,} floats, one thread: {copy_s * 1e3:.1f} ms")
    rows: list[dict[str, Any]] = []
    for name, codec in CODECS.items():
        code = torch.zeros(codec.nbytes(NUMEL), dtype=torch.uint8)
        rows.append({"codec": name, "bytes per float": len(code) / NUMEL,
                     "coding, copies": seconds(partial(codec.encode, x, code)) / copy_s,
                     "decoding, copies": seconds(partial(codec.add_decoded, code, out)) / copy_s})
    report.table("time of coding, and of decoding and adding, as multiples of one copy", rows)
    for row in rows:
        for what in ("coding", "decoding"):
            limit = {"bf16": 3.0, "int8": 3.0}.get(str(row["codec"]), 5.0)
            report.aim(f"{what} {row['codec']}", row[f"{what}, copies"], limit, " copies")
    report.finish()
    return report


if __name__ == "__main__":
    target = json_path(__doc__)
    save([main()], target)
