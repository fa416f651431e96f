"""What do codecs cost in accuracy? The demo's task on virtual workers, every codec under four algorithms."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distoptim_experiments import records
from distoptim_experiments.config import RunConfig
from distoptim_experiments.machines import Machines
from distoptim_experiments.training import virtual

CODECS = ("float32", "bf16", "int8", "e3m0", "2bit", "2bit+ef", "e3m0+ef")
# The demo's learning rate for SGD, and AdamW's default.
SGD = {"lr": 0.01}
ADAMW = {"optimizer": "adamw", "lr": 1e-3}
ALGORITHMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "local-sgd": (SGD, {}),
    "overlap-local-sgd": (SGD, {}),
    "diloco": (ADAMW, {}),
    "streaming-diloco": (ADAMW, {"fragments": 4}),
}
SEEDS = (0, 1, 2)
STEPS = 252


def runs(folder: Path) -> Iterator[tuple[str, str, list[records.Summary]]]:
    """How all runs ended, by algorithm and codec.

    One made before is read from the folder.
    """
    for algorithm, (inner, own) in ALGORITHMS.items():
        for codec in CODECS:
            options = own if codec == "float32" else {**own, "codec": codec}
            config = RunConfig(
                algorithm=algorithm,
                options=options,
                tau=4,
                steps=STEPS,
                evaluate_every=10**6,
                **inner,
            )
            place = folder / f"{algorithm} {codec}"
            yield algorithm, codec, [run(config.replace(seed=s), place / str(s)) for s in SEEDS]


def run(config: RunConfig, folder: Path) -> records.Summary:
    """How a run ended."""
    if not records.finished(folder):
        virtual.run(config, Machines(), folder, threads=1)
    summary = records.read(folder).summary
    assert summary is not None
    return summary


def main() -> None:
    """Run what is missing, and print one row per algorithm and codec."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of finished runs")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    print("| algorithm | codec | accuracy, % | test loss | MB of payload |\n|---|---|---|---|---|")
    for algorithm, codec, ends in runs(folder):
        cells = [
            f"{statistics.mean(v):.{digits}f} ± {statistics.stdev(v):.{digits}f}"
            for digits, v in (
                (2, [100 * (end.test_accuracy or 0.0) for end in ends]),
                (4, [end.test_loss or math.nan for end in ends]),
            )
        ]
        print(
            "|",
            " | ".join([algorithm, codec, *cells, f"{ends[0].bytes / 1e6:.2f}"]),
            "|",
            flush=True,
        )


if __name__ == "__main__":
    main()
