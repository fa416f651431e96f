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
from distoptim.comm import Handle, ProcessGroupCommunicator, emulate

STEP_S = 0.05
TAU = 4
ROUNDS = 3
WARMUP = 3
METHODS = {"Local SGD": distoptim.LocalSGD, "Overlap-Local-SGD": distoptim.OverlapLocalSGD}
COMPUTE = "#0072B2"
WAIT = "#D55E00"
FLIGHT = "#F0B040"


class Recorder(ProcessGroupCommunicator):
    """Keeps the handles, for their clocks."""

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[Handle] = []

    def all_reduce(self, buffer: torch.Tensor) -> Handle:
        self.handles.append(super().all_reduce(buffer))
        return self.handles[-1]


def measure(method: Any) -> dict[str, list[tuple[float, float]]]:
    """Intervals of computation, waiting and communication in seconds, after the warm-up."""
    p = torch.nn.Parameter(torch.zeros(1000))
    recorder = Recorder()
    optimizer = method([p], lr=0.1, tau=TAU, communicator=recorder)
    compute = []
    waits = []
    for _ in range((WARMUP + ROUNDS) * TAU):
        start = time.perf_counter()
        while time.perf_counter() - start < STEP_S:
            torch.mm(torch.ones(64, 64), torch.ones(64, 64))
            for handle in recorder.handles[-1:]:
                handle.poll()
        p.grad = torch.ones(1000)
        optimizer.step()
        middle = time.perf_counter()
        optimizer.average()
        compute.append((start, middle))
        waits.append((middle, time.perf_counter()))
    flights = [
        (h.launched_at, h.finished_at) for h in recorder.handles if h.finished_at is not None
    ]
    optimizer.close()
    zero = compute[WARMUP * TAU][0]
    kinds = {"compute": compute, "wait": waits, "flight": flights}
    return {
        kind: [(a - zero, b - zero) for a, b in seen if b > zero] for kind, seen in kinds.items()
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
            [(i, COMPUTE, 1) for i in kinds["compute"]]
            + [(i, WAIT, 1) for i in kinds["wait"]]
            + [(i, FLIGHT, 0) for i in kinds["pending"]]
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
        done = max(b for _, b in kinds["wait"]) * 1e3
        axis.set_title(
            f"{name}: {ROUNDS} rounds of {TAU} local steps in {done:.0f} ms",
            loc="left",
            fontsize=11,
        )
        axis.set_yticks([1, 0], ["processor", "link"])
        axis.set_xlim(0, max(b for k in seen.values() for _, b in k["wait"]) * 1e3 * 1.01)
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
