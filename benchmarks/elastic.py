"""P10: what workers that come and go cost while nobody does: pairs of segments, with them and with fixed ones.

Two workers hold both optimizers and train with one after the other, so that the machine's noise hits both alike.
Exposed time is by `optimizer.stats()`, in ms a round.
"""

from __future__ import annotations

import os
import statistics
from itertools import pairwise
from typing import Any

import torch

import distoptim
from benchmarks.report import Report, json_path, save
from distoptim.testing.processes import run

WORKERS = 2
TAU = 10
PAIRS = 10
ROUNDS = 8
WIDTH = 512
DEPTH = 4
BATCH = 512


def segment(model: torch.nn.Module, optimizer: Any) -> float:
    """Exposed milliseconds a round."""
    x = torch.randn(BATCH, WIDTH)
    before = optimizer.stats()["exposed_s"]
    for _ in range(ROUNDS * TAU):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.average()
    return float(1e3 * (optimizer.stats()["exposed_s"] - before) / ROUNDS)


def paired(rank: int, address: str) -> dict[str, list[float]]:
    """Of one worker, the exposed times of all segments but the first."""
    found: dict[str, list[float]] = {}
    elastic = distoptim.Elastic(address, name="ab"[rank], start=WORKERS)
    trained = {}
    for name, where in {"fixed": {}, "elastic": {"communicator": elastic}}.items():
        layers = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)]
        model = torch.nn.Sequential(*layers)
        make: Any = distoptim.OverlapLocalSGD
        trained[name] = (model, make(model.parameters(), lr=1e-3, tau=TAU, **where))
    for turn in range(PAIRS + 1):
        for name, pair in trained.items():
            exposed = segment(*pair)
            if turn:
                found.setdefault(name, []).append(exposed)
    for _, optimizer in trained.values():
        optimizer.close()
    return found


def main() -> Report:
    """Print the table."""
    # It would print every question of every worker.
    os.environ.setdefault("RUST_LOG", "warn")
    from torchft.coordination import LighthouseServer

    report = Report("elastic")
    # As `distoptim lighthouse` starts it.
    server = LighthouseServer(
        bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=60_000, quorum_tick_ms=20
    )
    address = f"127.0.0.1:{server.address().rpartition(':')[2]}"
    found = run(paired, WORKERS, address, timeout_s=900)
    server.shutdown()
    means = {
        name: [statistics.mean(pair) for pair in zip(*(one[name] for one in found), strict=True)]
        for name in ("fixed", "elastic")
    }
    rows = [
        {
            "workers": name,
            "exposed ms a round": round(statistics.median(values), 3),
            "from": round(min(values), 3),
            "to": round(max(values), 3),
        }
        for name, values in means.items()
    ]
    report.table("pairs of segments", rows)
    differences = [b - a for a, b in zip(means["fixed"], means["elastic"], strict=True)]
    # What fixed workers differ by from one segment to the next.
    noise = statistics.pstdev(b - a for a, b in pairwise(means["fixed"]))
    error = statistics.stdev(differences) / len(differences) ** 0.5
    report.aim(
        "exposed more than with fixed ones", statistics.mean(differences), noise, " ms", error
    )
    report.finish()
    return report


if __name__ == "__main__":
    target = json_path(__doc__)
    save([main()], target)
