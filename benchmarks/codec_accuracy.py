"""What do codecs cost in accuracy? The demo's task on virtual workers, every codec under two algorithms."""

from __future__ import annotations

import statistics
import sys

from distoptim.sim.machines import Machines
from distoptim.sim.run import VirtualRun
from distoptim.train.config import RunConfig

CODECS = (None, "int8", "e3m0", "2bit+ef")
SEEDS, EPOCHS = (0, 1, 2), 4


def final(algorithm: str, codec: str | None, seed: int) -> dict[str, float]:
    """The last line of one run's record."""
    options = {} if codec is None else {"codec": codec}
    config = RunConfig(algorithm=algorithm, options=options, tau=4, epochs=EPOCHS, seed=seed, evaluate_every=10**6)
    lines: list[dict[str, float]] = []
    VirtualRun(config, Machines(), threads=1).train(lines.append)
    return lines[-1]


def main() -> None:
    """Run, and print one row per algorithm and codec."""
    print("| algorithm | codec | accuracy, % | test loss | MB sent |\n|---|---|---|---|---|")
    for algorithm in ("local-sgd", "overlap-local-sgd"):
        for codec in CODECS:
            runs = [final(algorithm, codec, seed) for seed in SEEDS]
            cells = [f"{statistics.mean(v):.{digits}f} ± {statistics.stdev(v):.{digits}f}" for digits, v in (
                (2, [100 * r["test_accuracy"] for r in runs]), (4, [r["test_loss"] for r in runs]))]
            print("|", " | ".join([algorithm, codec or "float32", *cells, f"{runs[0]['bytes'] / 1e6:.2f}"]), "|")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
