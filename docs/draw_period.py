"""Draw period.png: tau follows a link that becomes ten times slower in mid-run, and recovers.

Two workers train over an emulated link with `HideCommunication`. Run: python docs/draw_period.py
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import distoptim
from distoptim.comm import emulate
from distoptim.periods import HideCommunication

STEP_S = 0.03
STEPS = 480
SLOW = (160, 320)
NUMEL = 100_000
FAST_GBIT_S = 0.08  # one all-reduce takes 40 ms


def worker(rank: int, path: str) -> None:
    """Train, and note after each local step: the clock, what was exposed so far, tau, syncs."""
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    torch.set_num_threads(1)
    dist.init_process_group(
        emulate(latency_s=0.0, bandwidth_gbit_s=FAST_GBIT_S),
        init_method=f"file://{path}.store",
        rank=rank,
        world_size=2,
    )
    p = torch.nn.Parameter(torch.zeros(NUMEL))
    optimizer = distoptim.OverlapLocalSGD([p], lr=0.1, tau=HideCommunication())
    p.grad = torch.ones_like(p)
    rows = []
    for step in range(STEPS):
        if step in SLOW:
            emulate(
                latency_s=0.0, bandwidth_gbit_s=FAST_GBIT_S / 10 if step == SLOW[0] else FAST_GBIT_S
            )
        time.sleep(STEP_S)  # the computation
        optimizer.step()
        optimizer.average()
        stats = optimizer.stats()
        rows.append([stats[key] for key in ("exposed_s", "computation_s", "tau", "syncs")])
    if rank == 0:
        Path(path).write_text(json.dumps(rows))
    optimizer.close()
    dist.destroy_process_group()


def rounds(rows: list[list[float]]) -> list[tuple[int, int, float, int]]:
    """(first step, last step, exposed share of its computation, tau) of each round.

    Between two syncs.
    """
    out = []
    start = 0
    for i in range(1, len(rows)):
        if rows[i][3] > rows[i - 1][3]:
            exposed, computed = (rows[i][k] - rows[start][k] for k in (0, 1))
            out.append((start + 1, i + 1, exposed / max(computed, 1e-9), i - start))
            start = i
    return out


def draw(rows: list[list[float]], to: Path) -> None:
    """Exposed share per round above, tau below."""
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 3.6), layout="constrained")
    for first, last, share, _ in rounds(rows):
        above.plot(
            [first, last], [100 * share] * 2, color="#D55E00", linewidth=2, solid_capstyle="butt"
        )
    above.set_ylabel("exposed, % of\ncomputation")
    below.step(range(1, len(rows) + 1), [r[2] for r in rows], where="post", color="#0072B2")
    below.set(ylabel="tau", xlabel="local step", ylim=(0, None))
    for axis in (above, below):
        axis.axvspan(*SLOW, color="#999999", alpha=0.2, linewidth=0)
    above.text(sum(SLOW) / 2, above.get_ylim()[1], "link ten times slower", ha="center", va="top")
    figure.savefig(to, dpi=150)


def main() -> None:
    """Run and draw; prints every round."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "rows.json")
        mp.spawn(worker, args=(path,), nprocs=2)
        rows = json.loads(Path(path).read_text())
    for first, last, share, length in rounds(rows):
        print(f"steps {first:3}-{last:3}: round of {length:2}, {100 * share:6.2f} % exposed")
    draw(rows, Path(__file__).parent / "period.png")


if __name__ == "__main__":
    main()
