"""What a sync costs the worker that makes it: time against the memory's own rate, and memory in
model copies.

One process, one thread, ResNet-18's 62 tensors; means are finished at once, so what is left is the
algorithm's own work. Everything is measured in turn within each repetition, so that the machine's
noise hits all alike.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.profiler import ProfilerActivity, profile

import distoptim
from benchmarks.report import Report, json_path, save
from distoptim.comm import ProcessGroupCommunicator, SingleWorker

REPETITIONS = 41
WARM_UP = 4
QUICK_CALLS = 2000

# name -> (how it is made, extra memory in model copies that the docs state)
ALGORITHMS: dict[str, tuple[Callable[..., Any], int]] = {
    "LocalSGD": (distoptim.LocalSGD, 1),
    "LocalSGD with outer momentum": (
        lambda *a, **k: distoptim.LocalSGD(*a, outer_momentum=0.7, **k),
        3,
    ),
    "BMUF": (lambda *a, **k: distoptim.BMUF(*a, block_momentum=0.9, **k), 3),
    "SlowMo": (distoptim.SlowMo, 3),
    "EASGD": (distoptim.EASGD, 2),
    "CoCoDSGD": (distoptim.CoCoDSGD, 2),
    "OverlapBMUF": (distoptim.OverlapBMUF, 3),
    "GlobalMomentum": (lambda *a, **k: distoptim.GlobalMomentum(*a, codec=None, **k), 3),
    "OverlapLocalSGD": (distoptim.OverlapLocalSGD, 3),
    "DiLoCo": (distoptim.DiLoCo, 3),
    "DiLoCo carrying": (
        lambda *a, tau, **k: distoptim.DiLoCo(*a, tau=tau, delay=tau, carry=True, **k),
        4,
    ),
    "StreamingDiLoCo": (distoptim.StreamingDiLoCo, 3),
    "EagerDiLoCo": (distoptim.EagerDiLoCo, 5),
    "CO2": (distoptim.CO2, 3),
}
POST_LOCAL = "torch's PostLocalSGD"


def resnet18_shapes(classes: int = 10) -> Iterator[tuple[int, ...]]:
    """ResNet-18 in its form for 32 x 32 pictures: 62 tensors, 11.17M elements."""

    def convolution(into: int, out: int, kernel: int) -> Iterator[tuple[int, ...]]:
        yield (out, into, kernel, kernel)
        yield from ((out,), (out,))  # batch norm

    yield from convolution(3, 64, 3)
    width = 64
    for out in (64, 128, 256, 512):
        for _ in range(2):
            yield from convolution(width, out, 3)
            yield from convolution(out, out, 3)
            if width != out:
                yield from convolution(width, out, 1)
            width = out
    yield from ((classes, width), (classes,))


def parameters(kind: str) -> list[Tensor]:
    """Random parameters of one kind, with gradients."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for shape in resnet18_shapes():
        x = torch.randn(shape, generator=generator)
        x = x.bfloat16() if kind == "bfloat16" else x
        if kind == "channels_last" and x.dim() == 4:
            x = x.to(memory_format=torch.channels_last)
        p = torch.nn.Parameter(x)
        p.grad = torch.full_like(p, 1e-3)
        out.append(p)
    return out


def sync_times(kind: str) -> dict[str, float]:
    """Median processor seconds of the memory floor ("floor") and of one sync of everything, measured in turn."""
    z, buffer = torch.zeros(2, sum(p.numel() for p in parameters(kind)))
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "floor": (lambda: None, lambda: z.add_(buffer))
    }
    for name, (make, _) in ALGORITHMS.items():
        optimizer = make(parameters(kind), lr=0.1, tau=1, communicator=SingleWorker())
        calls[name] = optimizer.step, optimizer.average
    inner = torch.optim.SGD(parameters(kind), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # it advises against a period of 1, which here makes every call a sync
        averager = PeriodicModelAverager(period=1)
    post_local = PostLocalSGDOptimizer(inner, averager)
    calls[POST_LOCAL] = inner.step, lambda: averager.average_parameters(post_local.param_groups)

    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(WARM_UP + REPETITIONS):
        for name, (local_step, call) in calls.items():
            local_step()  # keeps momenta away from 0 and brings caches to the state they have in training
            start = time.thread_time()
            call()
            seconds[name].append(time.thread_time() - start)
    out = {name: statistics.median(times[WARM_UP:]) for name, times in seconds.items()}
    # add_ passes over memory three times (reads two tensors, writes one), a sync of OverlapLocalSGD
    # at least seven times (reads x, mean, v; writes x, z, v and the payload).
    out["floor"] *= 7 / 3
    return out


def quick_us(name: str) -> float:
    """Median microseconds of an average() between syncs, with a real gloo handle in flight where there is one."""
    optimizer = ALGORITHMS[name][0](
        parameters("float32"), lr=0.1, tau=50, communicator=ProcessGroupCommunicator()
    )
    for _ in range(50):
        optimizer.average()
    times = []
    for _ in range(QUICK_CALLS // 40):
        for _ in range(40):
            start = time.perf_counter()
            optimizer.average()
            times.append(time.perf_counter() - start)
        for _ in range(10):  # the sync is among these
            optimizer.average()
    optimizer.close()
    return statistics.median(times) * 1e6


def memory_copies(name: str, kind: str = "float32") -> tuple[float, float]:
    """(kept, highest) memory beyond parameters and gradients after construction and three syncs, in
    model copies.

    Counted from the allocator's own events, not from what the optimizer says; plain SGD keeps
    nothing.
    """
    params = parameters(kind)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as events:
        optimizer = ALGORITHMS[name][0](params, lr=0.1, tau=1, communicator=SingleWorker())
        for _ in range(3):
            optimizer.step()
            optimizer.average()
    now = highest = 0
    changes = [e for e in events.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]  # set once the profile has ended
    for event in sorted(changes, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    copy = sum(p.numel() for p in params) * 4
    return now / copy, highest / copy


def time_table(report: Report) -> None:
    times = {kind: sync_times(kind) for kind in ("float32", "channels_last", "bfloat16")}
    floor = times["float32"]["floor"]
    report.note(
        f"memory floor of a sync: 7 passes over the float32 parameters at the rate of z.add_(buffer) = "
        f"{floor * 1e3:.2f} ms ({7 * 4e-9 * 11_173_962 / floor:.0f} GB/s); medians of {REPETITIONS}"
    )
    rows = []
    for name in (*ALGORITHMS, POST_LOCAL):
        row: dict[str, Any] = {"sync of": name, "ms": times["float32"][name] * 1e3}
        for kind, of_kind in times.items():
            row[kind] = of_kind[name] / of_kind["floor"]
        row["between, us"] = quick_us(name) if name in ALGORITHMS else None
        rows.append(row)
    report.table(
        "a sync that waits for nobody: processor ms; multiples of the floor for three kinds of parameters; "
        "an average() between syncs",
        rows,
    )
    overlap = next(row for row in rows if row["sync of"] == "OverlapLocalSGD")
    report.aim("sync of OverlapLocalSGD", overlap["float32"], 2.0, " x floor")
    report.aim("average() between syncs, slowest algorithm", max(quick_of(rows)), 10.0, " us")


def quick_of(rows: list[dict[str, Any]]) -> list[float]:
    return [row["between, us"] for row in rows if row["sync of"] in ALGORITHMS]


def memory_table(report: Report) -> None:
    rows = []
    for name, (_, claimed) in ALGORITHMS.items():
        kept, highest = memory_copies(name)
        rows.append(
            {
                "algorithm": name,
                "docs": claimed,
                "measured": kept,
                "highest": highest,
                "highest, bfloat16 parameters": memory_copies(name, "bfloat16")[1],
            }
        )
    report.table(
        "memory beyond parameters, gradients and inner state, in float32 model copies", rows
    )
    report.aim(
        "memory, largest difference from the docs",
        max(abs(r["measured"] - r["docs"]) for r in rows),
        0.01,
        " copies",
    )


def main() -> Report:
    torch.set_num_threads(1)
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # the profiler, which counts the memory, is to be silent
    report = Report("cost of a sync: ResNet-18 (62 tensors, 11.17M float32), one thread")
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "gloo", init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1
        )
        time_table(report)
        memory_table(report)
        dist.destroy_process_group()
    report.finish()
    return report


if __name__ == "__main__":
    target = json_path(__doc__)
    save([main()], target)
