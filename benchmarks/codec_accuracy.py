"""What do codecs cost in accuracy? The demo's task on virtual workers, every codec under four algorithms."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distoptim_experiments.config import RunConfig
from distoptim_experiments.machines import Machines
from distoptim_experiments.training.virtual import VirtualRun

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


def runs(folder: Path) -> Iterator[tuple[str, str, list[dict[str, float]]]]:
    """The last lines of all runs by algorithm and codec.

    One made before is read from the folder.
    """
    for algorithm, (inner, own) in ALGORITHMS.items():
        for codec in CODECS:
            yield (
                algorithm,
                codec,
                [run(folder, algorithm, codec, seed, inner, own) for seed in SEEDS],
            )


def run(
    folder: Path, algorithm: str, codec: str, seed: int, inner: dict[str, Any], own: dict[str, Any]
) -> dict[str, float]:
    """The last line of one run's record."""
    file = folder / f"{algorithm} {codec} {seed}.json"
    if file.exists():
        return dict(json.loads(file.read_text()))
    options = own if codec == "float32" else {**own, "codec": codec}
    config = RunConfig(
        algorithm=algorithm,
        options=options,
        tau=4,
        steps=STEPS,
        seed=seed,
        evaluate_every=10**6,
        **inner,
    )
    lines: list[dict[str, float]] = []
    VirtualRun(config, Machines(), threads=1).train(lines.append)
    file.write_text(
        json.dumps({key: lines[-1][key] for key in ("test_accuracy", "test_loss", "bytes")})
    )
    return lines[-1]


def main() -> None:
    """Run what is missing, and print one row per algorithm and codec."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of finished runs")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    print("| algorithm | codec | accuracy, % | test loss | MB of payload |\n|---|---|---|---|---|")
    for algorithm, codec, lines in runs(folder):
        cells = [
            f"{statistics.mean(v):.{digits}f} ± {statistics.stdev(v):.{digits}f}"
            for digits, v in (
                (2, [100 * line["test_accuracy"] for line in lines]),
                (4, [line["test_loss"] for line in lines]),
            )
        ]
        print(
            "|",
            " | ".join([algorithm, codec, *cells, f"{lines[0]['bytes'] / 1e6:.2f}"]),
            "|",
            flush=True,
        )


if __name__ == "__main__":
    main()
