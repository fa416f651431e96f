"""Which method over AdamW reads Shakespeare best at equal tokens? Resumable; the full table has not been made yet."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

from distoptim.sim.grid import name
from distoptim.sim.machines import Machines
from distoptim.sim.run import run
from distoptim.train import records
from distoptim.train.config import RunConfig

METHODS = ("ddp", "local-sgd", "diloco", "streaming-diloco", "eager-diloco", "overlap-local-sgd", "cocod-sgd", "co2")
FRAGMENTS = {"streaming-diloco": {"fragments": 2}}
TAUS, LEARNING_RATES, SEEDS = (10, 50), (4e-3, 8e-3, 16e-3), (0, 1, 2)
MACHINES = Machines(step_ms=100.0, latency_ms=10.0, bandwidth_gbit_s=0.1)


def config(plays: str, method: str, tau: int, lr: float, seed: int, steps: int) -> RunConfig:
    """4 workers with batches of 4 windows each."""
    return RunConfig(algorithm=method, tau=tau, options=FRAGMENTS.get(method, {}), seed=seed, lr=lr, steps=steps,
                     data=plays, model="gpt-small", workers=4, batch_size=4, optimizer="adamw", weight_decay=0.1,
                     clip_norm=1.0, schedule="cosine", warmup_epochs=0.02, validation=0.05, evaluate_every=steps)


def settings() -> Iterator[tuple[str, int]]:
    """Every method with every tau that means something to it."""
    for method in METHODS:
        yield from ((method, tau) for tau in (TAUS if method != "ddp" else (1,)))


def record(c: RunConfig, folder: Path) -> records.Record:
    """Of the run, which is made if it has none."""
    target = folder / name(c, MACHINES)
    if not (target / records.FILE).exists():
        run(c, MACHINES, target, threads=1)
        print(f"made {target.name}, lr {c.lr:g}", flush=True)
    return records.read(target)


def score(of: records.Record, key: str) -> float:
    """A value of the summary; of a run that diverged, infinity."""
    assert of.summary is not None
    return float(of.summary.get(key, "inf"))


def main() -> None:
    """Choose learning rates on the validation part with the first seed and tau, run all seeds, print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plays", help="file or folder of text")
    parser.add_argument("--folder", type=Path, default=Path("runs/shakespeare"), help="of the records")
    parser.add_argument("--steps", type=int, default=400, help="of each worker")
    given = parser.parse_args()
    chosen: dict[str, float] = {}
    lines = ["| method | " + " | ".join(f"lr {lr:g}" for lr in LEARNING_RATES) + " |",
             "|---" * (1 + len(LEARNING_RATES)) + "|"]
    for method in METHODS:
        tau = 1 if method == "ddp" else TAUS[0]
        tried = {lr: score(record(config(given.plays, method, tau, lr, SEEDS[0], given.steps), given.folder),
                           "validation_loss") for lr in LEARNING_RATES}
        best = chosen[method] = min(tried, key=lambda lr: tried[lr])
        cells = (f"**{loss:.3f}**" if lr == best else f"{loss:.3f}" for lr, loss in tried.items())
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += ["", "| method | tau | nats per byte | next byte right, % | MB sent per worker |", "|---|---|---|---|---|"]
    runs = {key: [config(given.plays, *key, chosen[key[0]], seed, given.steps) for seed in SEEDS] for key in settings()}
    for i in range(len(SEEDS)):
        for same in runs.values():
            record(same[i], given.folder)
    for (method, tau), same in runs.items():
        made = [record(c, given.folder) for c in same]
        loss, right = ([score(r, key) for r in made] for key in ("test_loss", "test_accuracy"))
        lines.append(f"| {method} | {tau} | {statistics.mean(loss):.3f} +- {statistics.stdev(loss):.3f} | "
                     f"{100 * statistics.mean(right):.2f} +- {100 * statistics.stdev(right):.2f} | "
                     f"{score(made[0], 'bytes') / 1e6:.0f} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
