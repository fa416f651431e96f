"""Draw rounds.png: what one worker does under Local SGD and Overlap-Local-SGD, as the clock saw it.

Two workers run over an emulated link on which one all-reduce takes about as long as two of the four
local
steps of a round. Run: python docs/draw_rounds.py
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import distoptim
from distoptim.comm import emulate

STEP_S = 0.05
TAU = 4
ROUNDS = 3
WARMUP = 3
METHODS = {"Local SGD": distoptim.LocalSGD, "Overlap-Local-SGD": distoptim.OverlapLocalSGD}
COMPUTE = "#0072B2"
WAIT = "#D55E00"
FLIGHT = "#F0B040"


def measure(method: Any) -> dict[str, list[tuple[float, float]]]:
    """Intervals of computation, waiting and communication in seconds, after the warm-up."""
    p = torch.nn.Parameter(torch.zeros(1000))
    optimizer = method([p], lr=0.1, tau=TAU)
    for _ in range((WARMUP + ROUNDS) * TAU):
        start = time.perf_counter()
        while time.perf_counter() - start < STEP_S:
            torch.mm(torch.ones(64, 64), torch.ones(64, 64))
            optimizer.engine.poll()
        p.grad = torch.full((1000,), float(dist.get_rank()))
        optimizer.step()
        optimizer.average()
    spans = optimizer.history()
    optimizer.close()
    zero = next(s.end_s for s in spans if s.name == "step" and s.step == WARMUP * TAU - 1)
    return {
        kind: [
            (s.start_s - zero, s.end_s - zero) for s in spans if s.name == kind and s.end_s > zero
        ]
        for kind in ("step", "wait", "in flight")
    }


def worker(rank: int, store: str, out: str) -> None:
    """Measure all methods; rank 0 writes."""
    torch.set_num_threads(1)
    backend = emulate(latency_s=STEP_S, bandwidth_gbit_s=100)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=2)
    seen = {name: measure(method) for name, method in METHODS.items()}
    if rank == 0:
        Path(out).write_text(json.dumps(seen))
    dist.destroy_process_group()


def draw(seen: dict[str, dict[str, list[tuple[float, float]]]], path: Path) -> None:
    """Two lanes per method: the processor above, the link below."""
    mpl.rcParams.update({"font.size": 11, "font.family": "sans-serif"})
    figure, axes = plt.subplots(len(seen), 1, figsize=(9.5, 3.7), sharex=True, layout="constrained")
    for axis, (name, kinds) in zip(axes, seen.items(), strict=True):
        for (a, b), color, lane in (
            [(i, COMPUTE, 1) for i in kinds["step"]]
            + [(i, WAIT, 1) for i in kinds["wait"]]
            + [(i, FLIGHT, 0) for i in kinds["in flight"]]
        ):
            left = max(a, 0.0)
            axis.barh(
                lane,
                (b - left) * 1e3,
                left=left * 1e3,
                height=0.62,
                color=color,
                edgecolor="white",
                linewidth=1,
            )
        done = last(kinds) * 1e3
        axis.set_title(
            f"{name}: {ROUNDS} rounds of {TAU} local steps in {done:.0f} ms",
            loc="left",
            fontsize=11,
        )
        axis.set_yticks([1, 0], ["processor", "link"])
        axis.set_xlim(0, max(map(last, seen.values())) * 1e3 * 1.01)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[-1].set_xlabel("milliseconds")
    entries = [("local step", COMPUTE), ("waiting (exposed)", WAIT), ("mean in flight", FLIGHT)]
    figure.legend(
        [plt.Rectangle((0, 0), 1, 1, color=c) for _, c in entries],
        [n for n, _ in entries],
        loc="outside upper right",
        ncols=3,
        frameon=False,
    )
    figure.savefig(path, facecolor="white", dpi=130)


def last(kinds: dict[str, list[tuple[float, float]]]) -> float:
    """When the worker was done."""
    return max(end for kind in ("step", "wait") for _, end in kinds[kind])


def main() -> None:
    """Measure and draw."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(f"{folder}/store", f"{folder}/seen.json"), nprocs=2)
        draw(
            json.loads(Path(folder, "seen.json").read_text()),
            Path(__file__).with_name("rounds.png"),
        )


if __name__ == "__main__":
    main()
